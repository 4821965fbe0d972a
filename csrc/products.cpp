// Sums over edits, in float64: products of experts, what masks keep, how far rows lie apart.

#include "strips.hpp"

namespace ota {
namespace OTA_ISA {

namespace {

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
