// One tile in, statistics out: scores, histograms, masked edits, sums of curvature. The table of all kernels.

#include "around.hpp"
#include "places.hpp"
#include "strips.hpp"

namespace ota {
namespace OTA_ISA {

void merge(const MergeArgs&, MergeStats&);                   // merge.cpp
void gram(const Tile&, By, double*);                         // products.cpp
void masked_sums(const Tile&, MaskedSums*);                  // products.cpp
void row_divergence(const Tile&, int, double*);              // products.cpp

namespace {

// Calls step(offset, n, scores) for each strip.
template <typename Step>
void for_scores(const Tile& tile, int t, SurveyStats& stats, Step step) {
    Strip<float> x;
    prepare(tile, x);
    by_strips(tile, x, [&] {
        alignas(64) int32_t usable[kStrip];
        alignas(64) float used[kStrip];
        score(tile, t, x, stats, usable, used);
        step(x.offset, x.n, used);
    });
}

// Calls step(offset, n, edits) for each strip: d32 where the edit is kept, else 0.
template <typename Step>
void for_kept(const Tile& tile, int t, SurveyStats& stats, Step step) {
    Strip<float> x;
    prepare(tile, x);
    const Ranked ranked(tile, t, t + 1, x);
    by_strips(tile, x, [&] {
        alignas(64) int32_t usable[kStrip];
        alignas(64) float used[kStrip];
        score(tile, t, x, stats, usable, used);
        select(tile, t, used, x);
        for (int i = 0; i < x.n; ++i) x.edits[t][i] = x.keep[t][i] ? x.edits[t][i] : 0.0f;
        step(x.offset, x.n, x.edits[t]);
    });
}

void edits(const Tile& tile, int t, float* out, SurveyStats& stats) {
    for_kept(tile, t, stats, [&](int64_t offset, int n, const float* d) {
        std::memcpy(out + offset, d, sizeof(float) * static_cast<size_t>(n));
    });
}

void scores(const Tile& tile, int t, float* out, SurveyStats& stats) {
    for_scores(tile, t, stats, [&](int64_t offset, int n, const float* s) {
        std::memcpy(out + offset, s, sizeof(float) * static_cast<size_t>(n));
    });
}

int64_t around(const Tile& tile, int t, Interval* of, int intervals, int64_t* counts, SurveyStats& stats) {
    static_assert(kCounted % kStrip == 0, "whole strips");
    int64_t nonzero = 0;
    Strip<float> x;
    prepare(tile, x);
    for (int64_t offset = 0; offset < tile.n; offset += kCounted, counts += int64_t{intervals} * kAround) {
        const int n = static_cast<int>(tile.n - offset < kCounted ? tile.n - offset : kCounted);
        if (look_around_in_blocks(tile, t, offset, n, of, intervals, counts, nonzero)) continue;
        for (int64_t at = offset; at < offset + n; at += x.n) {
            alignas(64) int32_t usable[kStrip];
            alignas(64) float used[kStrip];
            go_to(tile, at, x);
            load_base(tile, x);
            score(tile, t, x, stats, usable, used);
            for (int i = 0; i < x.n; ++i) nonzero += used[i] != 0.0f ? 1 : 0;
            for (int k = 0; k < intervals; ++k) look_around(used, x.n, of[k], counts + k * kAround);
        }
    }
    return nonzero;
}

// Runs from files and memory.

constexpr int kRuns = 1024;  // elements that are gathered at once

// The runs from number `first` on, `n` of them, of inputs of `size` bytes an element, one after the other. False
// where their file could not be read.
bool gather(const RunArgs& args, const uint8_t* data, const FilePlace& file, int size, int64_t first, int64_t n,
            uint8_t* room) {
    const int64_t* starts = args.starts + first;
    if (file.fd >= 0) return read_runs(file, size, starts, n, args.length, args.together, room);
    copy_runs(data, size, starts, n, args.count - first, args.length, room);
    return true;
}

bool gather(const RunArgs& args, Operand& x, const FilePlace& file, int64_t first, int64_t n, uint8_t* room) {
    if (x.data == nullptr) return true;
    const bool whole = gather(args, x.data, file, item_size(x.dtype), first, n, room);
    x.data = room;
    return whole;
}

// Curvature of the runs, as float32 where it is not stored as numbers.
bool gather(const RunArgs& args, Curvature& c, const FilePlace& file, int64_t first, int64_t n, uint8_t* room) {
    if (c.kind == CurvatureKind::uniform) return true;
    if (c.kind == CurvatureKind::full) return gather(args, c.values, file, first, n, room);
    uint8_t codes[kRuns];
    const bool has_codes = c.kind == CurvatureKind::log8;
    if (has_codes && !gather(args, c.codes, file, 1, first, n, codes)) return false;
    auto* h = reinterpret_cast<float*>(room);
    for (int64_t i = 0; i < n; ++i, h += args.length) {
        Curvature run = c;
        run.start += args.starts[first + i];
        run.codes = has_codes ? codes + i * args.length : nullptr;
        for (int done = 0; done < args.length; done += kStrip) {
            alignas(64) float strip[kStrip];
            const int some = args.length - done < kStrip ? args.length - done : kStrip;
            std::memcpy(h + done, load(run, done, some, strip), sizeof(float) * static_cast<size_t>(some));
        }
    }
    c = {};
    c.kind = CurvatureKind::full;
    c.values = {room, DType::f32};
    return true;
}

// Room for the inputs of a gathered expert.
struct Gathered {
    uint8_t weights[kRuns * sizeof(double)], origin[kRuns * sizeof(double)], curvature[kRuns * sizeof(double)];
};

Unread run_scores(const Tile& tile, const RunArgs& args, float* const* out) {
    using Role = Unread::Role;
    const bool all = tile.words.score == Score::spread;  // their score takes every expert
    const int64_t most = kRuns / args.length / args.together * args.together;
    const int n_rooms = all ? tile.n_experts : 1;
    auto* rooms = new Gathered[static_cast<size_t>(n_rooms)];
    uint8_t base[kRuns * sizeof(double)];
    int64_t index[kRuns];
    auto* piece = new Tile(tile);
    Unread unread;
    for (int64_t first = 0; first < args.count && unread.role == Role::none; first += most) {
        const int64_t n = args.count - first < most ? args.count - first : most;
        piece->n = n * args.length, piece->index = index;
        for (int64_t i = 0; i < piece->n; ++i) {
            const int64_t at = args.starts[first + i / args.length] + i % args.length;
            index[i] = tile.index != nullptr ? tile.index[at] : tile.start + at;
        }
        piece->base = tile.base;
        if (!gather(args, piece->base, args.base, first, n, base)) unread = {Role::base, -1};
        const auto fetch = [&](int t, Gathered& room) {
            Expert& e = piece->experts[t];
            e.weights = tile.experts[t].weights, e.origin = tile.experts[t].origin;
            e.curvature = tile.experts[t].curvature;
            if (!gather(args, e.weights, args.weights[t], first, n, room.weights)) unread = {Role::weights, t};
            if (!gather(args, e.origin, args.origins[t], first, n, room.origin)) unread = {Role::origin, t};
            if (tile.words.read_curvature() && !gather(args, e.curvature, args.curvature[t], first, n, room.curvature))
                unread = {Role::curvature, t};
        };
        for (int t = 0; all && t < tile.n_experts; ++t) fetch(t, rooms[t]);
        for (int i = 0; i < args.n_experts && unread.role == Role::none; ++i) {
            const int t = args.experts[i];
            if (!all) fetch(t, rooms[0]);
            if (unread.role != Role::none) break;
            SurveyStats unused;
            scores(*piece, t, out[i] + first * args.length, unused);
        }
    }
    delete piece;
    delete[] rooms;
    return unread;
}

// Arrays of scores.

Between between(const float* values, int64_t n, float low, float high, float* out) {
    Between found;
    int64_t i = 0;
#if defined(__AVX512F__)
    const __m512 lowest = _mm512_set1_ps(low), highest = _mm512_set1_ps(high);
    for (; i + 16 <= n; i += 16) {
        const __m512 x = _mm512_loadu_ps(values + i);
        const __mmask16 above = _mm512_cmp_ps_mask(x, highest, _CMP_GE_OQ);
        const auto inside = static_cast<__mmask16>(_mm512_cmp_ps_mask(x, lowest, _CMP_GE_OQ) & ~above);
        _mm512_storeu_ps(out + found.inside, _mm512_maskz_compress_ps(inside, x));
        found.inside += __builtin_popcount(inside);
        found.above += __builtin_popcount(above);
    }
#endif
    for (; i < n; ++i) {
        out[found.inside] = values[i];
        found.inside += values[i] >= low && values[i] < high ? 1 : 0;
        found.above += values[i] >= high ? 1 : 0;
    }
    return found;
}

int64_t count_at_least(const float* values, int64_t length, float least) {
    int32_t n = 0;
    for (int64_t i = 0; i < length; ++i) n += values[i] >= least ? 1 : 0;
    return n;
}

int64_t squared_differences(const float* values, int64_t rows, int64_t length, float least) {
    int64_t sum = 0;
    for (int64_t row = 0; row + 1 < rows; row += 2, values += 2 * length) {
        const int64_t apart = count_at_least(values, length, least) - count_at_least(values + length, length, least);
        sum += apart * apart;
    }
    return sum;
}

void histogram(const Tile& tile, int t, bool of_edits, int64_t prefix, int64_t* counts, int64_t* lows,
               SurveyStats& stats) {
    const auto count = [&](int64_t, int n, const float* values) {
        for (int i = 0; i < n; ++i) {
            const uint32_t bits = suspicion(values[i]), high = bits >> 16, low = bits & 0xffffu;
            if (prefix < 0) {
                ++counts[high];
                lows[high] += low;
            } else if (high == static_cast<uint32_t>(prefix)) {
                ++counts[low];
            }
        }
    };
    of_edits ? for_kept(tile, t, stats, count) : for_scores(tile, t, stats, count);
}

// Sums of curvature.

double power_sum(const Curvature& curvature, int64_t total, double p, NonFinite& bad) {
    alignas(64) float room[kStrip];
    double lanes[kLanes] = {};
    for (int64_t offset = 0; offset < total; offset += kStrip) {
        const int n = static_cast<int>(total - offset < kStrip ? total - offset : kStrip);
        const float* h = load(curvature, offset, n, room);
        if (any_bad_curvature(h, n))
            for (int i = 0; i < n; ++i)
                if (!is_curvature(h[i])) bad.add(offset + i);
        alignas(64) double x[kStrip] = {};
        for (int i = 0; i < n; ++i) {
            const double v = is_curvature(h[i]) ? static_cast<double>(h[i]) : 0.0;
            x[i] = p == 0.5 ? std::sqrt(v) : p == 1.0 ? v : std::pow(v, p);
        }
        add_to_lanes(x, n, lanes);
    }
    return fold(lanes);
}

void row_column_sums(const Curvature& v, int64_t rows, int64_t columns, double* row_sums, double* column_sums,
                     NonFinite& bad) {
    alignas(64) float room[kStrip];
    for (int64_t row = 0; row < rows; ++row) {
        double lanes[kLanes] = {};
        for (int64_t column = 0; column < columns; column += kStrip) {
            const int n = static_cast<int>(columns - column < kStrip ? columns - column : kStrip);
            const float* h = load(v, row * columns + column, n, room);
            if (any_bad_curvature(h, n))
                for (int i = 0; i < n; ++i)
                    if (!is_curvature(h[i])) bad.add(row * columns + column + i);
            alignas(64) double x[kStrip] = {};
            for (int i = 0; i < n; ++i) x[i] = is_curvature(h[i]) ? static_cast<double>(h[i]) : 0.0;
            for (int i = 0; i < n; ++i) column_sums[column + i] += x[i];
            add_to_lanes(x, n, lanes);
        }
        row_sums[row] = fold(lanes);
    }
}

}  // namespace

const Kernels kernels = {merge,     histogram,       edits, scores, around, run_scores, between, squared_differences,
                         power_sum, row_column_sums, gram,  masked_sums, row_divergence};

}  // namespace OTA_ISA
}  // namespace ota
