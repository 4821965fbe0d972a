// One tile in, statistics out: score histograms, masked edits, sums of powers, row and column sums.
// Sums run in a fixed order (kLanes partial sums, folded pairwise), the same for every instruction set.

#include "formulas.hpp"
#include "lanes.hpp"
#include "lists.hpp"

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

// Runs of x, one after the other. `left`: how many more starts there are.
Operand gather(const Operand& x, const int64_t* starts, int n, int64_t left, int length, uint8_t* room) {
    copy_runs(x.data, item_size(x.dtype), starts, n, left, length, room);
    return {room, x.dtype};
}

void run_scores(const SurveyArgs* of_experts, int n_experts, const int64_t* starts, int64_t count, int length,
                float* const* out) {
    constexpr int kRoom = kBlock * sizeof(double);
    alignas(64) uint8_t base_room[kRoom], weight_room[kRoom], curvature_room[kRoom];
    const int64_t most = kBlock / length;
    for (int64_t i = 0; i < count; i += most) {
        const int64_t left = count - i;
        const int n = static_cast<int>(left < most ? left : most);
        Operand base;
        if (of_experts[0].has_base) base = gather(of_experts[0].base, starts + i, n, left, length, base_room);
        for (int t = 0; t < n_experts; ++t) {
            SurveyArgs piece = of_experts[t];
            Curvature& c = piece.expert.curvature;
            piece.n = int64_t{n} * length;
            piece.base = base;
            piece.expert.weights = gather(piece.expert.weights, starts + i, n, left, length, weight_room);
            if (c.kind == CurvatureKind::full) {
                c.values = gather(c.values, starts + i, n, left, length, curvature_room);
            } else if (c.kind != CurvatureKind::uniform) {
                auto* h = reinterpret_cast<float*>(curvature_room);
                for (int j = 0; j < n; ++j) load(c, starts[i + j], length, h + j * length);
                c = {};
                c.kind = CurvatureKind::full;
                c.values = {curvature_room, DType::f32};
            }
            SurveyStats unused;
            float* scores = out[t] + i * length;
            for_scores(piece, unused, [&](int64_t offset, int m, const float*, const float* s) {
                std::memcpy(scores + offset, s, sizeof(float) * static_cast<size_t>(m));
            });
        }
    }
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

const Kernels kernels = {merge, histogram, edits, scores, run_scores, between, power_sum, row_column_sums};

}  // namespace OTA_ISA
}  // namespace ota
