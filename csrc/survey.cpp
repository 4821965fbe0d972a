// One tile in, statistics out: score histograms, masked edits, sums of powers, row and column sums.
// Sums run in a fixed order (kLanes partial sums, folded pairwise), the same for every instruction set.

#include "formulas.hpp"
#include "lanes.hpp"
#include "lists.hpp"
#include "windows.hpp"

namespace ota {
namespace OTA_ISA {

void merge(const MergeArgs&, MergeStats&);

namespace {

constexpr int kLanes = 8;

double fold(const double* lanes) {
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Calls step(offset, n, d, scores) for each block; unusable elements score 0 and are counted. d is the task
// vector (w itself without a base), zeroed where the element is not usable.
template <typename Step>
void for_scores(const SurveyArgs& args, SurveyStats& stats, Step step) {
    float base_room[kBlock], weight_room[kBlock], curvature_room[kBlock], d[kBlock], s[kBlock];
    const float k = args.expert.score_scale;
    for (int64_t offset = 0; offset < args.n; offset += kBlock) {
        const int n = static_cast<int>(args.n - offset < kBlock ? args.n - offset : kBlock);
        const float* w = load(args.expert.weights, offset, n, weight_room);
        const float* h = load(args.expert.curvature, offset, n, curvature_room);
        bool bad = any_nonfinite(w, n) || any_bad_curvature(h, n);
        if (args.has_base) {
            const float* base = load(args.base, offset, n, base_room);
            bad |= any_nonfinite(base, n);
            for (int i = 0; i < n; ++i) {
                d[i] = w[i] - base[i];
                s[i] = saliency(h[i], d[i], k);
                s[i] = s[i] >= 0.0f ? s[i] : 0.0f;  // a curvature above 2^96 times an edit of 0
            }
            if (bad)
                for (int i = 0; i < n; ++i)
                    if (!is_finite(base[i])) stats.base.add(offset + i), d[i] = s[i] = 0.0f;
        } else {
            for (int i = 0; i < n; ++i) {
                d[i] = w[i];
                s[i] = h[i] * k;
            }
        }
        if (bad)
            for (int i = 0; i < n; ++i) {
                if (!is_finite(w[i])) stats.weights.add(offset + i), d[i] = s[i] = 0.0f;
                if (!is_curvature(h[i])) stats.curvature.add(offset + i), d[i] = s[i] = 0.0f;
            }
        step(offset, n, d, s);
    }
}

void edits(const SurveyArgs& args, float* out, SurveyStats& stats) {
    const float threshold = args.expert.threshold;
    for_scores(args, stats, [&](int64_t offset, int n, const float* d, const float* s) {
        for (int i = 0; i < n; ++i) out[offset + i] = s[i] >= threshold ? d[i] : 0.0f;
    });
}

void scores(const SurveyArgs& args, float* out, SurveyStats& stats) {
    for_scores(args, stats, [&](int64_t offset, int n, const float*, const float* s) {
        for (int i = 0; i < n; ++i) out[offset + i] = s[i];
    });
}

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
    const bool whole = gather(args, x.data, file, item_size(x.dtype), first, n, room);
    x.data = room;
    return whole;
}

// Curvature of the runs, as float32 where it is not stored as numbers.
bool gather(const RunArgs& args, Curvature& c, const FilePlace& file, int64_t first, int64_t n, uint8_t* room) {
    if (c.kind == CurvatureKind::uniform) return true;
    if (c.kind == CurvatureKind::full) return gather(args, c.values, file, first, n, room);
    uint8_t codes[kBlock];
    const bool has_codes = c.kind == CurvatureKind::log8;
    if (has_codes && !gather(args, c.codes, file, 1, first, n, codes)) return false;
    auto* h = reinterpret_cast<float*>(room);
    for (int64_t i = 0; i < n; ++i, h += args.length) {
        Curvature run = c;
        run.start += args.starts[first + i];
        run.codes = has_codes ? codes + i * args.length : nullptr;
        load(run, 0, args.length, h);
    }
    c = {};
    c.kind = CurvatureKind::full;
    c.values = {room, DType::f32};
    return true;
}

int run_scores(const RunArgs& args, float* const* out) {
    constexpr int kRoom = kBlock * sizeof(double);
    alignas(64) uint8_t base_room[kRoom], weight_room[kRoom], curvature_room[kRoom];
    const int64_t most = kBlock / args.length / args.together * args.together;
    for (int64_t first = 0; first < args.count; first += most) {
        const int64_t n = args.count - first < most ? args.count - first : most;
        Operand base = args.of_experts[0].base;
        if (args.of_experts[0].has_base && !gather(args, base, args.base, first, n, base_room)) return 0;
        for (int t = 0; t < args.n_experts; ++t) {
            SurveyArgs piece = args.of_experts[t];
            piece.n = n * args.length;
            piece.base = base;
            if (!gather(args, piece.expert.weights, args.weights[t], first, n, weight_room)) return 1 + 2 * t;
            if (!gather(args, piece.expert.curvature, args.curvature[t], first, n, curvature_room)) return 2 + 2 * t;
            SurveyStats unused;
            float* scores = out[t] + first * args.length;
            for_scores(piece, unused, [&](int64_t offset, int m, const float*, const float* s) {
                std::memcpy(scores + offset, s, sizeof(float) * static_cast<size_t>(m));
            });
        }
    }
    return -1;
}

Between between(const float* values, int64_t n, float low, float high, float* out) {
    Between found;
    int64_t i = 0;
#if defined(OTA_LANES)
    for (; i + OTA_LANES <= n; i += OTA_LANES) {
        const lanes::Floats x = lanes::load(values + i);
        const lanes::Mask above = lanes::at_least(x, lanes::all(high));
        const lanes::Mask inside = lanes::without(lanes::at_least(x, lanes::all(low)), above);
        lanes::write(inside, lanes::bits(x), reinterpret_cast<uint32_t*>(out + found.inside));
        found.inside += lanes::count(inside);
        found.above += lanes::count(above);
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

void histogram(const SurveyArgs& args, int64_t prefix, int64_t* counts, int64_t* lows, SurveyStats& stats) {
    const float threshold = args.expert.threshold;
    const bool of_edits = args.score == Score::edit;
    for_scores(args, stats, [&](int64_t, int n, const float* d, const float* s) {
        uint32_t bits[kBlock];
        for (int i = 0; i < n; ++i) {
            const float edit = s[i] >= threshold ? d[i] : 0.0f;
            bits[i] = bit_cast<uint32_t>(of_edits ? edit : s[i]) & 0x7fffffffu;
        }
        if (prefix < 0) {
            for (int i = 0; i < n; ++i) {
                ++counts[bits[i] >> 16];
                lows[bits[i] >> 16] += bits[i] & 0xffffu;
            }
        } else {
            for (int i = 0; i < n; ++i)
                if (bits[i] >> 16 == static_cast<uint32_t>(prefix)) ++counts[bits[i] & 0xffffu];
        }
    });
}

double power_sum(const Curvature& curvature, int64_t total, double p, NonFinite& bad) {
    float room[kBlock];
    double lanes[kLanes] = {};
    for (int64_t offset = 0; offset < total; offset += kBlock) {
        const int n = static_cast<int>(total - offset < kBlock ? total - offset : kBlock);
        const float* h = load(curvature, offset, n, room);
        if (any_bad_curvature(h, n))
            for (int i = 0; i < n; ++i)
                if (!is_curvature(h[i])) bad.add(offset + i);
        double x[kBlock] = {};
        for (int i = 0; i < n; ++i) {
            const double v = is_curvature(h[i]) ? static_cast<double>(h[i]) : 0.0;
            x[i] = p == 0.5 ? std::sqrt(v) : p == 1.0 ? v : std::pow(v, p);
        }
        for (int i = 0; i < n; i += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
    }
    return fold(lanes);
}

void row_column_sums(const Curvature& v, int64_t rows, int64_t columns, double* row_sums, double* column_sums,
                     NonFinite& bad) {
    float room[kBlock];
    for (int64_t row = 0; row < rows; ++row) {
        double lanes[kLanes] = {};
        for (int64_t column = 0; column < columns; column += kBlock) {
            const int n = static_cast<int>(columns - column < kBlock ? columns - column : kBlock);
            const float* h = load(v, row * columns + column, n, room);
            if (any_bad_curvature(h, n))
                for (int i = 0; i < n; ++i)
                    if (!is_curvature(h[i])) bad.add(row * columns + column + i);
            double x[kBlock] = {};
            for (int i = 0; i < n; ++i) x[i] = is_curvature(h[i]) ? static_cast<double>(h[i]) : 0.0;
            for (int i = 0; i < n; ++i) column_sums[column + i] += x[i];
            for (int i = 0; i < n; i += kLanes)
                for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += x[i + lane];
        }
        row_sums[row] = fold(lanes);
    }
}

}  // namespace

const Kernels kernels = {merge,   histogram,           edits,     scores,         run_scores,
                         between, squared_differences, power_sum, row_column_sums};

}  // namespace OTA_ISA
}  // namespace ota
