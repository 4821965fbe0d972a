// One tile in, statistics out: scores, histograms, masked edits, sums of powers and masks, row and column sums, products.
// Sums run in a fixed order (kLanes partial sums, folded pairwise), the same for every instruction set.

#include "places.hpp"
#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

void merge(const MergeArgs&, MergeStats&);

namespace {

constexpr int kLanes = 8;

double fold(const double* lanes) {
    return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// Adds values whose places in [n, kStrip) are 0.
void add_to_lanes(const double* values, int n, double* lanes) {
    for (int i = 0; i < n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
}

// Calls step(strip) for each strip of the tile, its base loaded.
template <typename Acc, typename Step>
void by_strips(const Tile& tile, Strip<Acc>& x, Step step) {
    for (int64_t offset = 0; offset < tile.n; offset += kStrip) {
        go_to(tile, offset, x);
        load_base(tile, x);
        step();
    }
}

// Expert t's edits (x.edits[t], 0 where an input is not usable) and its scores as they are counted, of the strip.
// usable: where its inputs are, or none where all are.
template <typename Acc>
const int32_t* score(const Tile& tile, int t, Strip<Acc>& x, SurveyStats& stats, int32_t* room, float* used) {
    bool bad = tile.has_base() && count_unusable_base(x, stats.base);
    if (is_suspect(tile, t, x)) bad |= count_unusable(tile, t, x, stats.weights, stats.curvature);
    if (bad) find_usable(tile, t, x, room);
    share_scores(tile, x);
    if (tile.words.score != Score::spread) find_edits(tile, t, x);
    use(find_scores(tile, t, x), bad ? room : nullptr, x.n, used);
    if (bad)
        for (int i = 0; i < x.n; ++i) x.edits[t][i] = room[i] ? x.edits[t][i] : 0.0f;
    return bad ? room : nullptr;
}

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

// Sums of edits, in float64.

// The edits of expert t as float64, 0 in [n, kStrip).
void find_edits64(const Tile& tile, int t, Strip<double>& x, double* d) {
    std::memset(d, 0, sizeof(double) * kStrip);
    const double* o = origin(tile, t, x);
    with_weights(tile, t, 0, x, [&](const auto* w) {
        for (int i = 0; i < x.n; ++i) d[i] = static_cast<double>(w[i]) - o[i];
    });
}

using Edits64 = double[kMaxExperts][kStrip];

// Adds the products of the edits of n elements to T x T sums of kLanes each.
void multiply(const Edits64& d, int n_experts, int n, double* lanes) {
    for (int s = 0; s < n_experts; ++s)
        for (int t = 0; t <= s; ++t) {
            double* sums = lanes + (s * n_experts + t) * kLanes;
            for (int i = 0; i < n; i += kLanes)
                for (int lane = 0; lane < kLanes; ++lane) sums[lane] += d[s][i + lane] * d[t][i + lane];
        }
}

void gram_of_rows(const Tile& tile, int64_t length, Strip<double>& x, Edits64& d, double* out) {
    const int n_experts = tile.n_experts;
    const size_t n_lanes = static_cast<size_t>(n_experts * n_experts) * kLanes;
    auto* lanes = static_cast<double*>(std::calloc(n_lanes + 1, sizeof(double)));
    if (lanes == nullptr) throw std::bad_alloc();
    for (int64_t row = 0; row < tile.n; row += length, out += n_experts * n_experts) {
        std::memset(lanes, 0, n_lanes * sizeof(double));
        for (int64_t at = row; at < row + length; at += x.n) {
            go_to(tile, at, x);
            if (x.n > row + length - at) x.n = static_cast<int>(row + length - at);
            load_base(tile, x);
            for (int t = 0; t < n_experts; ++t) find_edits64(tile, t, x, d[t]);
            multiply(d, n_experts, x.n, lanes);
        }
        for (int s = 0; s < n_experts; ++s)
            for (int t = 0; t <= s; ++t)
                out[s * n_experts + t] = out[t * n_experts + s] = fold(lanes + (s * n_experts + t) * kLanes);
    }
    std::free(lanes);
}

void gram_of_columns(const Tile& tile, Strip<double>& x, Edits64& d, double* out) {
    const int64_t pairs = int64_t{tile.n_experts} * tile.n_experts;
    for (int64_t begin = 0; begin < tile.columns; begin += kStrip)
        for (int64_t row = 0; row < tile.n; row += tile.columns) {
            go_to(tile, row + begin, x);
            if (x.n > tile.columns - begin) x.n = static_cast<int>(tile.columns - begin);
            load_base(tile, x);
            for (int t = 0; t < tile.n_experts; ++t) find_edits64(tile, t, x, d[t]);
            for (int i = 0; i < x.n; ++i) {
                double* sums = out + (begin + i) * pairs;
                for (int s = 0; s < tile.n_experts; ++s)
                    for (int t = 0; t < tile.n_experts; ++t) sums[s * tile.n_experts + t] += d[s][i] * d[t][i];
            }
        }
}

void gram(const Tile& tile, By by, double* out) {
    Strip<double> x;
    Edits64 d;
    prepare(tile, x);
    const int64_t groups = by == By::tensor ? 1 : by == By::column ? tile.columns : tile.n / tile.columns;
    std::memset(out, 0, sizeof(double) * static_cast<size_t>(groups * tile.n_experts * tile.n_experts));
    if (tile.n == 0) return;
    by == By::column ? gram_of_columns(tile, x, d, out)
                     : gram_of_rows(tile, by == By::row ? tile.columns : tile.n, x, d, out);
}

void masked_sums(const Tile& tile, MaskedSums* out) {
    Strip<double> x;
    prepare(tile, x);
    const Ranked ranked(tile, 0, tile.n_experts, x);
    double lanes[kMaxExperts][3][kLanes] = {};
    by_strips(tile, x, [&] {
        alignas(64) int32_t keepers[kStrip] = {}, usable[kStrip];
        alignas(64) double d[kStrip], size[kStrip], kept[kStrip], squares[kStrip];
        share_scores(tile, x);
        for (int t = 0; t < tile.n_experts; ++t) {
            SurveyStats unused;
            alignas(64) float used[kStrip];
            const bool bad = score(tile, t, x, unused, usable, used) != nullptr;
            select(tile, t, used, x);
            find_edits64(tile, t, x, d);
            std::memset(size, 0, sizeof(size)), std::memset(kept, 0, sizeof(kept)), std::memset(squares, 0, sizeof(kept));
            for (int i = 0; i < x.n; ++i) {
                const bool counts = !bad || usable[i] != 0;
                x.keep[t][i] = counts ? x.keep[t][i] : 0;
                size[i] = counts ? std::fabs(d[i]) : 0.0;
                kept[i] = x.keep[t][i] ? size[i] : 0.0;
                squares[i] = kept[i] * kept[i];
                keepers[i] -= x.keep[t][i];
            }
            add_to_lanes(size, x.n, lanes[t][0]);
            add_to_lanes(kept, x.n, lanes[t][1]);
            add_to_lanes(squares, x.n, lanes[t][2]);
        }
        for (int t = 0; t < tile.n_experts; ++t)
            for (int i = 0; i < x.n; ++i) {
                const double keeps = x.keep[t][i] ? 1.0 : 0.0;
                out[t].kept += keeps;
                (keepers[i] > 1 ? out[t].shared : out[t].unique) += keeps;
            }
    });
    for (int t = 0; t < tile.n_experts; ++t)
        out[t].l1 = fold(lanes[t][0]), out[t].kept_l1 = fold(lanes[t][1]), out[t].kept_squares = fold(lanes[t][2]);
}

// exp(values - largest) into `out`, and their sum, of a row; where, if anywhere, the row is not finite, NaN.
struct Softmax {
    double largest = -HUGE_VAL, sum = 0;
};

template <typename Load>
Softmax softmax_of(int64_t columns, Load values) {
    Softmax found;
    double lanes[kLanes] = {};
    for (int64_t at = 0; at < columns; at += kStrip) {
        int n;
        const double* x = values(at, n);
        for (int i = 0; i < n; ++i) found.largest = x[i] > found.largest ? x[i] : found.largest;
    }
    for (int64_t at = 0; at < columns; at += kStrip) {
        int n;
        const double* x = values(at, n);
        alignas(64) double shifted[kStrip] = {};
        for (int i = 0; i < n; ++i) shifted[i] = std::exp(x[i] - found.largest);
        add_to_lanes(shifted, n, lanes);
    }
    found.sum = fold(lanes);
    return found;
}

// As sum p (x - log1p(x)), x = q / p - 1: p and q have equal sums, so sum p x = 0, and no term is negative; near-equal
// rows keep their digits.
void row_divergence(const Tile& tile, int t, double* out) {
    Strip<double> x;
    alignas(64) double room[kStrip], other[kStrip];
    prepare(tile, x);
    const Operand &w = tile.experts[t].weights, &o = tile.origin(t);
    for (int64_t row = 0; row < tile.n; row += tile.columns) {
        const auto of = [&](const Operand& from, double* to) {
            return [&tile, &from, to, row](int64_t at, int& n) {
                n = static_cast<int>(tile.columns - at < kStrip ? tile.columns - at : kStrip);
                return view<double>(from, row + at, n, to);
            };
        };
        const auto ours = of(w, room), theirs = of(o, other);
        const Softmax p = softmax_of(tile.columns, ours), q = softmax_of(tile.columns, theirs);
        double lanes[kLanes] = {};
        for (int64_t at = 0; at < tile.columns; at += kStrip) {
            int n;
            const double *a = ours(at, n), *b = theirs(at, n);
            alignas(64) double terms[kStrip] = {};
            for (int i = 0; i < n; ++i) {
                const double one = std::exp(a[i] - p.largest) / p.sum + 1e-8;
                const double two = std::exp(b[i] - q.largest) / q.sum + 1e-8;
                const double apart = (two - one) / one, term = apart - std::log1p(apart);
                terms[i] = one * (term < 0 ? 0.0 : term);
            }
            add_to_lanes(terms, n, lanes);
        }
        *out++ = fold(lanes);
    }
}

}  // namespace

const Kernels kernels = {merge,     histogram,       edits, scores,      run_scores, between, squared_differences,
                         power_sum, row_column_sums, gram,  masked_sums, row_divergence};

}  // namespace OTA_ISA
}  // namespace ota
