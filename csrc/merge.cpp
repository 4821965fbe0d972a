// One tile in, one merged tile out: transform, score, select, weight, combine and round, block by block,
// with nothing intermediate in memory. Single-threaded; the engine runs one tile per thread.
//
// Decisions (masks, trimming, elected signs) are float32 operations in one fixed order. Values are of type
// Acc: float32 for 16-bit outputs, float64 for wider ones.

#include "formulas.hpp"

namespace ota {
namespace OTA_ISA {
namespace {

// Aligned to a cache line: split accesses cost half of the speed.
template <typename Acc>
struct alignas(64) Block {
    Acc base[kBlock], numerator[kBlock], denominator[kBlock], result[kBlock];
    float weight_room[kBlock], curvature_room[kBlock];
    float elected[kBlock];  // sum of the trimmed edits, whose sign TIES elects
    int32_t kept_by[kBlock];  // only where `counts_keepers`
    double wide_room[kBlock];
};

// Whether "kept by nobody" must be counted. Elsewhere every kept P_t is at least epsilon > 0, so that the
// denominator is 0 exactly where the masks keep nothing.
template <typename Acc>
bool counts_keepers(const Formula& f) {
    return f.masked &&
           (f.denominator != 0 || !f.mask_weights || !f.curvature_weights || !(static_cast<Acc>(f.epsilon) > 0));
}

// The operands of one expert over one block. wide is set for float64 weights with a float64 result.
struct View {
    const float* w;
    const double* wide;
    const float* h;
};

// The score of w against base; without a base the curvature alone. Float32 throughout.
template <bool HasBase>
inline float score(float h, float w, float base, float k) {
    return HasBase ? saliency(h, w - base, k) : h * k;
}

// numerator += m P (e d), denominator += m P (or P).
enum class Mask { none, plain, counted };

template <Power P, bool HasBase, Mask M, typename Acc, typename W>
int64_t accumulate(const Formula& f, const Expert& expert, int n, const W* __restrict w,
                   const float* __restrict h, Block<Acc>& block) {
    const Acc a = static_cast<Acc>(expert.weight_scale), epsilon = static_cast<Acc>(f.epsilon);
    const Acc p = static_cast<Acc>(f.power), edit_scale = static_cast<Acc>(expert.edit_scale);
    const float threshold = expert.threshold, k = expert.score_scale;
    const bool weigh_all = !f.mask_weights;
    const Acc* __restrict base = block.base;
    Acc* __restrict numerator = block.numerator;
    Acc* __restrict denominator = block.denominator;
    int32_t* __restrict kept_by = block.kept_by;
    int32_t kept = 0;
    for (int i = 0; i < n; ++i) {
        const Acc d = static_cast<Acc>(w[i]) - base[i];
        const Acc all = weight<P, Acc>(static_cast<Acc>(h[i]), a, p, epsilon);
        const float s = score<HasBase>(h[i], static_cast<float>(w[i]), static_cast<float>(base[i]), k);
        const int32_t keep = M == Mask::none || s >= threshold ? 1 : 0;
        const Acc masked = keep ? all : Acc(0);
        denominator[i] += M == Mask::counted && weigh_all ? all : masked;
        numerator[i] += masked * (edit_scale * d);
        if (M == Mask::counted) kept_by[i] += keep;
        kept += keep;
    }
    return kept;
}

// First half of TIES: the sum of the trimmed masked edits, whose sign is elected.
template <bool HasBase, typename Acc, typename W>
int64_t elect(const Expert& expert, int n, const W* __restrict w, const float* __restrict h,
              Block<Acc>& block) {
    const float threshold = expert.threshold, k = expert.score_scale, trim = expert.trim;
    const float edit_scale = static_cast<float>(expert.edit_scale);
    const Acc* __restrict base = block.base;
    float* __restrict elected = block.elected;
    int32_t* __restrict kept_by = block.kept_by;
    int32_t kept = 0;
    for (int i = 0; i < n; ++i) {
        const float wf = static_cast<float>(w[i]), b = static_cast<float>(base[i]), d = wf - b;
        const int32_t keep = score<HasBase>(h[i], wf, b, k) >= threshold ? 1 : 0;
        elected[i] += keep & (std::fabs(d) >= trim) ? edit_scale * d : 0.0f;
        kept_by[i] += keep;
        kept += keep;
    }
    return kept;
}

// Second half: sum the trimmed edits that agree with the elected sign.
template <bool HasBase, typename Acc, typename W>
void disjoint_sum(const Expert& expert, int n, const W* __restrict w, const float* __restrict h,
                  Block<Acc>& block) {
    const float threshold = expert.threshold, k = expert.score_scale, trim = expert.trim;
    const Acc a = static_cast<Acc>(expert.weight_scale), edit_scale = static_cast<Acc>(expert.edit_scale);
    const Acc* __restrict base = block.base;
    const float* __restrict elected = block.elected;
    Acc* __restrict numerator = block.numerator;
    for (int i = 0; i < n; ++i) {
        const float wf = static_cast<float>(w[i]), b = static_cast<float>(base[i]), d = wf - b;
        const bool survives = (score<HasBase>(h[i], wf, b, k) >= threshold) & (std::fabs(d) >= trim);
        const bool agrees = ((d > 0.0f) & (elected[i] > 0.0f)) | ((d < 0.0f) & (elected[i] < 0.0f));
        const Acc edit = a * (edit_scale * (static_cast<Acc>(w[i]) - base[i]));
        numerator[i] += survives & agrees ? edit : Acc(0);
    }
}

template <typename Acc, typename W>
int64_t accumulate(const MergeArgs& args, const Expert& expert, int n, const W* w, const float* h,
                   Block<Acc>& block) {
    const Formula& f = args.formula;
    const auto run = [&](auto with_base, auto without_base) {
        return args.has_base ? with_base(f, expert, n, w, h, block) : without_base(f, expert, n, w, h, block);
    };
    const bool counted = counts_keepers<Acc>(f);
#define OTA_PICK_MASK(P, M) run(accumulate<P, true, M, Acc, W>, accumulate<P, false, M, Acc, W>)
#define OTA_PICK(P)                                            \
    !f.masked ? OTA_PICK_MASK(P, Mask::none)                   \
    : counted ? OTA_PICK_MASK(P, Mask::counted)                \
              : OTA_PICK_MASK(P, Mask::plain)
    if (!f.curvature_weights) return OTA_PICK(Power::none);
    if (f.power == 0.5) return OTA_PICK(Power::half);
    if (f.power == 1.0) return OTA_PICK(Power::one);
    return OTA_PICK(Power::general);
#undef OTA_PICK
#undef OTA_PICK_MASK
}

template <typename Acc, typename W>
int64_t elect(const MergeArgs& args, const Expert& expert, int n, const W* w, const float* h,
              Block<Acc>& block) {
    return args.has_base ? elect<true>(expert, n, w, h, block) : elect<false>(expert, n, w, h, block);
}

template <typename Acc, typename W>
void disjoint_sum(const MergeArgs& args, const Expert& expert, int n, const W* w, const float* h,
                  Block<Acc>& block) {
    args.has_base ? disjoint_sum<true>(expert, n, w, h, block) : disjoint_sum<false>(expert, n, w, h, block);
}

template <typename Acc>
View view(const Expert& expert, int64_t offset, int n, Block<Acc>& block) {
    View v{load(expert.weights, offset, n, block.weight_room), nullptr,
           load(expert.curvature, offset, n, block.curvature_room)};
    if (sizeof(Acc) == sizeof(double) && expert.weights.dtype == DType::f64)
        v.wide = elements(expert.weights.data + 8 * offset, n, block.wide_room);
    return v;
}

// Calls step(weights, curvature) with the widest weights that the result can use.
template <typename Step>
auto with_weights(const View& v, Step step) {
    return v.wide ? step(v.wide, v.h) : step(v.w, v.h);
}

template <typename Acc>
void load_base(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats, bool& bad) {
    if (!args.has_base) {
        for (int i = 0; i < n; ++i) block.base[i] = Acc(0);
        return;
    }
    const float* w = load(args.base, offset, n, block.weight_room);
    if (any_nonfinite(w, n)) {
        bad = true;
        for (int i = 0; i < n; ++i)
            if (!is_finite(w[i])) stats.base.add(offset + i);
    }
    if (sizeof(Acc) == sizeof(double) && args.base.dtype == DType::f64) {
        const double* wide = elements(args.base.data + 8 * offset, n, block.wide_room);
        for (int i = 0; i < n; ++i) block.base[i] = static_cast<Acc>(wide[i]);
    } else {
        for (int i = 0; i < n; ++i) block.base[i] = static_cast<Acc>(w[i]);
    }
}

bool count_nonfinite(const View& v, int64_t offset, int n, NonFinite& weights, NonFinite& curvature) {
    bool bad = false;
    if (any_nonfinite(v.w, n))
        for (int i = 0; i < n; ++i)
            if (!is_finite(v.w[i])) weights.add(offset + i), bad = true;
    if (any_bad_curvature(v.h, n))
        for (int i = 0; i < n; ++i)
            if (!is_curvature(v.h[i])) curvature.add(offset + i), bad = true;
    return bad;
}

// The mean of the w_t, for elements that nobody keeps.
template <typename Acc>
void mean_of_experts(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, Acc* mean) {
    for (int i = 0; i < n; ++i) mean[i] = Acc(0);
    for (int t = 0; t < args.n_experts; ++t)
        with_weights(view(args.experts[t], offset, n, block), [&](const auto* w, const float*) {
            for (int i = 0; i < n; ++i) mean[i] += static_cast<Acc>(w[i]);
        });
    for (int i = 0; i < n; ++i) mean[i] /= static_cast<Acc>(args.n_experts);
}

// out = w_0 + lambda numerator / denominator, or w_0 where nobody keeps the element or the weights sum to 0.
// Returns how many elements fell back, and counts in `unkept` those that nobody keeps.
template <bool Counted, typename Acc>
int32_t quotient(const Formula& f, int n, Block<Acc>& block, int64_t& unkept) {
    const Acc lambda = static_cast<Acc>(f.lambda);
    const int32_t masked = f.masked ? 1 : 0;
    const Acc* __restrict base = block.base;
    const Acc* __restrict numerator = block.numerator;
    const Acc* __restrict denominator = block.denominator;
    const int32_t* __restrict kept_by = block.kept_by;
    Acc* __restrict result = block.result;
    int32_t nobody = 0, fallbacks = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t empty = denominator[i] == Acc(0) ? 1 : 0;
        const int32_t none = Counted ? (kept_by[i] == 0 ? 1 : 0) : empty & masked;
        const int32_t fallback = none | empty;
        const Acc merged = base[i] + lambda * (numerator[i] / denominator[i]);
        result[i] = fallback ? base[i] : merged;
        nobody += none;
        fallbacks += fallback;
    }
    unkept += nobody;
    return fallbacks;
}

template <typename Acc>
void combine(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    const Formula& f = args.formula;
    const bool counted = counts_keepers<Acc>(f);
    if (f.denominator != 0)
        for (int i = 0; i < n; ++i) block.denominator[i] = static_cast<Acc>(f.denominator);
    const int32_t fallbacks =
        counted ? quotient<true>(f, n, block, stats.unkept) : quotient<false>(f, n, block, stats.unkept);
    if (fallbacks == 0 || (f.fallback_to_base && args.has_base)) return;
    Acc mean[kBlock];
    mean_of_experts(args, offset, n, block, mean);
    for (int i = 0; i < n; ++i)
        if (block.denominator[i] == Acc(0) || (counted && block.kept_by[i] == 0)) block.result[i] = mean[i];
}

// `on_nonfinite: base`: the base value wherever some input of the element is not usable, and no mask there.
template <typename Acc>
void repair(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    bool bad[kBlock] = {};
    for (int t = 0; t < args.n_experts; ++t) {
        const View v = view(args.experts[t], offset, n, block);
        for (int i = 0; i < n; ++i) bad[i] = bad[i] || !is_finite(v.w[i]) || !is_curvature(v.h[i]);
    }
    for (int i = 0; i < n; ++i) {
        if (!bad[i]) continue;
        block.result[i] = block.base[i];
        ++stats.repaired;
    }
}

template <typename Acc>
void merge_tile(const MergeArgs& args, MergeStats& stats) {
    Block<Acc> block;
    const Acc limit = static_cast<Acc>(largest(args.out_dtype));
    for (int64_t offset = 0; offset < args.n; offset += kBlock) {
        const int n = static_cast<int>(args.n - offset < kBlock ? args.n - offset : kBlock);
        bool bad = false;
        load_base(args, offset, n, block, stats, bad);
        for (int i = 0; i < n; ++i) {
            block.numerator[i] = Acc(0);
            block.denominator[i] = Acc(0);
            block.elected[i] = 0.0f;
            block.kept_by[i] = 0;
        }
        for (int t = 0; t < args.n_experts; ++t) {
            const Expert& expert = args.experts[t];
            prefetch_next(expert.weights, offset, args.n);
            if (expert.curvature.kind == CurvatureKind::full)
                prefetch_next(expert.curvature.values, offset, args.n);
            const View v = view(expert, offset, n, block);
            bad |= count_nonfinite(v, offset, n, stats.weights[t], stats.curvature[t]);
            stats.kept[t] += with_weights(v, [&](const auto* w, const float* h) {
                return args.formula.elect_signs ? elect(args, expert, n, w, h, block)
                                                : accumulate(args, expert, n, w, h, block);
            });
        }
        if (args.formula.elect_signs)
            for (int t = 0; t < args.n_experts; ++t)
                with_weights(view(args.experts[t], offset, n, block),
                             [&](const auto* w, const float* h) {
                                 disjoint_sum(args, args.experts[t], n, w, h, block);
                             });
        combine(args, offset, n, block, stats);
        if (bad && args.formula.repair_nonfinite) repair(args, offset, n, block, stats);
        int32_t overflow = 0;
        for (int i = 0; i < n; ++i) overflow += !(std::fabs(block.result[i]) <= limit);
        stats.overflow += overflow;
        store(args.out_dtype, args.out, offset, n, block.result);
    }
}

}  // namespace

void merge(const MergeArgs& args, MergeStats& stats) {
    if (args.out_dtype == DType::f32 || args.out_dtype == DType::f64)
        merge_tile<double>(args, stats);
    else
        merge_tile<float>(args, stats);
}

}  // namespace OTA_ISA
}  // namespace ota
