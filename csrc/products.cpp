// Sums over edits, in float64: products of experts, what masks keep, how far rows lie apart.

#include "add.hpp"
#include "doubles.hpp"
#include "marks.hpp"
#include "strips.hpp"

namespace ota {
namespace OTA_ISA {

namespace {

// The edits of expert t as float64, 0 in [n, kStrip).
void find_edits64(const Tile& tile, int t, Strip<double>& x, double* d) {
    std::memset(d + x.n, 0, sizeof(double) * static_cast<size_t>(kStrip - x.n));
    const double* o = origin(tile, t, x);
    with_weights(tile, t, 0, x, [&](const auto* w) {
        for (int i = 0; i < x.n; ++i) d[i] = static_cast<double>(w[i]) - o[i];
    });
}

using Edits64 = double[kMaxExperts][kStrip];

// Adds the products of expert s's edits of n elements with those of N experts from t on to N sums of kLanes each, which
// are in registers meanwhile.
template <int N>
void multiply(const Edits64& d, int s, int t, int n, double* lanes) {
#if defined(OTA_LANES)
    using namespace OTA_ISA::lanes;
    const auto read = [](const double* p) { return Doubles{load(p), load(p + OTA_LANES / 2)}; };
    Eight sums[N];
    for (int k = 0; k < N; ++k) sums[k].load(lanes + k * kLanes);
    for (int i = 0; i < n; i += OTA_LANES) {
        const Doubles of_s = read(d[s] + i);
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) sums[k].add(mul(of_s, read(d[t + k] + i)));
    }
    for (int k = 0; k < N; ++k) sums[k].store(lanes + k * kLanes);
#else
    for (int k = 0; k < N; ++k)
        for (int i = 0; i < n; i += kLanes)
            for (int lane = 0; lane < kLanes; ++lane) lanes[k * kLanes + lane] += d[s][i + lane] * d[t + k][i + lane];
#endif
}

// Adds the products of the edits of n elements to T x T sums of kLanes each.
void multiply(const Edits64& d, int n_experts, int n, double* lanes) {
    for (int s = 0; s < n_experts; ++s) {
        double* row = lanes + int64_t{s} * n_experts * kLanes;
        by_groups(s + 1, 4, [&](int t, int size) {
            with_size<4>(size, [&](auto g) { multiply<decltype(g)::value>(d, s, t, n, row + t * kLanes); });
        });
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

// Sums over an expert's edits: of all, of those that it keeps, of their squares.
struct OfMasks {
    double l1[kLanes], kept_l1[kLanes], squares[kLanes];
};

void sum_strip(const Tile& tile, Strip<double>& x, OfMasks* lanes, MaskedSums* out) {
    alignas(64) int32_t keepers[kStrip] = {}, usable[kStrip];
    alignas(64) double d[kStrip], size[kStrip], kept[kStrip], squares[kStrip];
    load_base(tile, x);
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
        add_to_lanes(size, x.n, lanes[t].l1);
        add_to_lanes(kept, x.n, lanes[t].kept_l1);
        add_to_lanes(squares, x.n, lanes[t].squares);
    }
    for (int t = 0; t < tile.n_experts; ++t) {
        int32_t kept_by_it = 0, shared = 0;
        for (int i = 0; i < x.n; ++i) {
            kept_by_it -= x.keep[t][i];
            shared -= keepers[i] > 1 ? x.keep[t][i] : 0;
        }
        out[t].kept += kept_by_it, out[t].shared += shared, out[t].unique += kept_by_it - shared;
    }
}

#if defined(OTA_LANES)

// The same of n elements from `offset` on, whole strips. False, and nothing is added, where that is for sum_strip: an
// input is not usable.
template <typename W>
bool sum_blocks(const Tile& tile, int64_t offset, int n, OfMasks* sums, MaskedSums* out) {
    using namespace lanes;
    constexpr int V = 2;
    Marks<W, V> x(tile, offset, n);
    Eight l1[kMaxExperts], kept_l1[kMaxExperts], squares[kMaxExperts];
    Bits shared[kMaxExperts];
    for (int t = 0; t < tile.n_experts; ++t) {
        l1[t].load(sums[t].l1), kept_l1[t].load(sums[t].kept_l1), squares[t].load(sums[t].squares);
        shared[t] = all(0u);
    }
    in_rows(x, n, [&](int begin, int end) {
        for (int i = begin; i < end; i += x.kSize) {
            Floats b[V];
            Doubles wide[V];
            Mask any[V], several[V];
            x.read_base(i, b);
            for (int v = 0; v < V; ++v) wide[v] = In<double>::of(b[v]), any[v] = several[v] = nowhere();
            x.mark(i, b, nullptr, true, [&](int t, const Floats*, const Mask* m) {
                for (int v = 0; v < V; ++v) {
                    const Floats w = W::read(x.sources[t].w, i + v * OTA_LANES);
                    const Doubles d = size(sub(In<double>::of(w), wide[v])), kept = zero_unless(m[v], d);
                    l1[t].add(d), kept_l1[t].add(kept), squares[t].add(mul(kept, kept));
                    several[v] = either(several[v], both(any[v], m[v]));
                    any[v] = either(any[v], m[v]), x.keep[t][v] = m[v];
                }
            });
            for (int t = 0; t < tile.n_experts; ++t)
                for (int v = 0; v < V; ++v) shared[t] = count(shared[t], both(x.keep[t][v], several[v]));
        }
    });
    if (largest(x.top) >= kSuspect) return false;
    for (int t = 0; t < tile.n_experts; ++t) {
        l1[t].store(sums[t].l1), kept_l1[t].store(sums[t].kept_l1), squares[t].store(sums[t].squares);
        const int64_t kept = total(x.sources[t].kept), by_others = total(shared[t]);
        out[t].kept += static_cast<double>(kept), out[t].shared += static_cast<double>(by_others);
        out[t].unique += static_cast<double>(kept - by_others);
    }
    return true;
}

bool sum_in_blocks(const Tile& tile, int64_t offset, int n, OfMasks* sums, MaskedSums* out) {
    using namespace lanes;
    if (!are_marked_in_blocks(tile, 2 * OTA_LANES)) return false;
    return with_type(tile.experts[0].weights.dtype, [&](auto type) {
        return sum_blocks<decltype(type)>(tile, offset, n, sums, out);
    });
}

#else

bool sum_in_blocks(const Tile&, int64_t, int, OfMasks*, MaskedSums*) { return false; }

#endif

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

}  // namespace

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
    OfMasks lanes[kMaxExperts] = {};
    for (int64_t offset = 0; offset < tile.n;) {
        const int64_t strips = (tile.n - offset) / kStrip * kStrip;
        const int span = strips < kSpan ? static_cast<int>(strips) : kSpan;
        if (span > 0 && sum_in_blocks(tile, offset, span, lanes, out)) {
            offset += span;
            continue;
        }
        const int64_t end = span > 0 ? offset + span : tile.n;
        for (; offset < end; offset += x.n) {
            go_to(tile, offset, x);
            sum_strip(tile, x, lanes, out);
        }
    }
    for (int t = 0; t < tile.n_experts; ++t)
        out[t].l1 = fold(lanes[t].l1), out[t].kept_l1 = fold(lanes[t].kept_l1), out[t].kept_squares = fold(lanes[t].squares);
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

}  // namespace OTA_ISA
}  // namespace ota
