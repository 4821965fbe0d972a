// One tile in, one merged tile out: transform, score, select, weight, combine and round, block by block,
// with nothing intermediate in memory. Single-threaded; the engine runs one tile per thread.
//
// Decisions (masks, trimming, elected signs) are float32 operations in one fixed order. Values are of type
// Acc: float32 for 16-bit outputs, float64 for wider ones.

#include <type_traits>

#include "candidates.hpp"
#include "formulas.hpp"
#include "streamed.hpp"

namespace ota {
namespace OTA_ISA {
namespace {

// Besides float32, the type of weights that the loops read as they are; others are widened to float32 first.
template <typename Acc>
using Direct = std::conditional_t<std::is_same<Acc, double>::value, double, bf16>;

// Aligned to a cache line: split accesses cost half of the speed.
template <typename Acc>
struct alignas(64) Block {
    Acc base[kBlock], numerator[kBlock], denominator[kBlock];
    float weight_room[kBlock], curvature_room[kBlock];
    float elected[kBlock];  // sum of the trimmed edits, whose sign TIES elects
    int32_t kept_by[kBlock];
    int32_t undecided[kBlock];  // 1 where a score lies in its bracket
    bool counts_keepers;  // whether kept_by is in use
    Direct<Acc> direct_room[kBlock];

    Acc* merged() { return numerator; }  // once the sums are final
};

// Where weights of type W are copied to if they cannot be read in place.
template <typename W, typename Acc>
W* room(Block<Acc>& block) {
    if constexpr (std::is_same<W, float>::value)
        return block.weight_room;
    else
        return block.direct_room;
}

// Whether kept_by is needed. Elsewhere every kept P_t is at least epsilon > 0, so that the denominator is 0
// exactly where the masks keep nothing.
template <typename Acc>
bool counts_keepers(const MergeArgs& args) {
    const Formula& f = args.formula;
    bool rescaled = false;
    for (int t = 0; t < args.n_experts; ++t) rescaled |= args.experts[t].edit_scale != 1;
    return f.masked && (f.denominator != 0 || !f.mask_weights || !f.curvature_weights || rescaled ||
                        !(static_cast<Acc>(f.epsilon) > 0));
}

// One expert over one block; w and h may be read up to the next multiple of kChunk.
template <typename W>
struct View {
    int n;
    const W* w;
    const float* h;
    Ahead next_w, next_h;
};

// What a pass over an expert found. suspicion: at least kSuspect where some input may not be usable.
struct Found {
    int32_t kept = 0;
    uint32_t suspicion = 0;
};

// plain: what the OTA merge itself needs; open: brackets too; general: all that, rescaled edits, unmasked
// weights and counted keepers.
enum class Mask { none, plain, open, general };

// One chunk: numerator += m P (e d), denominator += m P (or P). One pass decides, adds and checks; a constant
// count and restrict parameters leave neither remainder nor alias checks.
template <Power P, bool HasBase, Mask M, typename Acc, typename W>
inline void accumulate(const Formula& f, const Expert& expert, const W* __restrict w,
                       const float* __restrict h, const Acc* __restrict base, Acc* __restrict numerator,
                       Acc* __restrict denominator, int32_t* __restrict kept_by, int32_t* __restrict undecided,
                       Found& found) {
    const Acc a = static_cast<Acc>(expert.weight_scale), epsilon = static_cast<Acc>(f.epsilon);
    const Acc p = static_cast<Acc>(f.power), edit_scale = static_cast<Acc>(expert.edit_scale);
    const float threshold = expert.threshold, k = expert.score_scale;
    const bool weigh_all = !f.mask_weights;
    // Usable inputs have a finite score that is not negative, unless it overflows: one look instead of two.
    constexpr bool kScoreTells = HasBase && M != Mask::none;
    const uint32_t lowest = bit_cast<uint32_t>(threshold), span = expert.span;
    int32_t kept = 0;
    uint32_t top = found.suspicion;
    for (int i = 0; i < kChunk; ++i) {
        const float wf = static_cast<float>(w[i]), b = static_cast<float>(base[i]);
        const Acc d = static_cast<Acc>(w[i]) - base[i];
        const Acc all = weight<P, Acc>(static_cast<Acc>(h[i]), a, p, epsilon);
        const float s = score<HasBase>(h[i], wf, b, k);
        const bool keep = M == Mask::none || s >= threshold;
        const Acc masked = keep ? all : Acc(0);
        denominator[i] += M == Mask::general && weigh_all ? all : masked;
        numerator[i] = std::fma(masked, M == Mask::general ? edit_scale * d : d, numerator[i]);
        if (M == Mask::general) kept_by[i] += keep ? 1 : 0;
        kept += keep ? 1 : 0;
        if ((M == Mask::open || M == Mask::general) && bit_cast<uint32_t>(s) - lowest < span) undecided[i] = 1;
        const uint32_t inputs = larger(suspicion(wf), suspicion_of_curvature(h[i]));
        top = larger(top, kScoreTells ? bit_cast<uint32_t>(s) : inputs);
    }
    found.kept += kept;
    found.suspicion = top;
}

template <Power P, bool HasBase, Mask M, typename Acc, typename W>
Found accumulate(const Formula& f, const Expert& expert, const View<W>& view, Block<Acc>& block) {
    Found found;
    for (int i = 0; i < view.n; i += kChunk) {
        view.next_w.fetch(i);
        view.next_h.fetch(i);
        accumulate<P, HasBase, M>(f, expert, view.w + i, view.h + i, block.base + i, block.numerator + i,
                                  block.denominator + i, block.kept_by + i, block.undecided + i, found);
    }
    if (M == Mask::none) found.kept = view.n;
    return found;
}

// First half of TIES, one chunk: the sum of the trimmed masked edits, whose sign is elected.
template <bool HasBase, typename Acc, typename W>
inline void elect(const Expert& expert, const W* __restrict w, const float* __restrict h,
                  const Acc* __restrict base, float* __restrict elected, int32_t* __restrict kept_by,
                  int32_t* __restrict undecided, Found& found) {
    const float threshold = expert.threshold, k = expert.score_scale, trim = expert.trim;
    const float edit_scale = static_cast<float>(expert.edit_scale);
    const uint32_t lowest = bit_cast<uint32_t>(threshold), span = expert.span;
    int32_t kept = 0;
    uint32_t top = found.suspicion;
    for (int i = 0; i < kChunk; ++i) {
        const float wf = static_cast<float>(w[i]), b = static_cast<float>(base[i]), d = wf - b;
        const float s = score<HasBase>(h[i], wf, b, k);
        const int32_t keep = s >= threshold ? 1 : 0;
        if (bit_cast<uint32_t>(s) - lowest < span) undecided[i] = 1;
        elected[i] += keep & (std::fabs(d) >= trim) ? edit_scale * d : 0.0f;
        kept_by[i] += keep;
        kept += keep;
        top = larger(top, larger(suspicion(wf), suspicion_of_curvature(h[i])));
    }
    found.kept += kept;
    found.suspicion = top;
}

template <bool HasBase, typename Acc, typename W>
Found elect(const Expert& expert, const View<W>& view, Block<Acc>& block) {
    Found found;
    for (int i = 0; i < view.n; i += kChunk) {
        view.next_w.fetch(i);
        view.next_h.fetch(i);
        elect<HasBase>(expert, view.w + i, view.h + i, block.base + i, block.elected + i, block.kept_by + i,
                       block.undecided + i, found);
    }
    return found;
}

// Second half: sum the trimmed edits that agree with the elected sign.
template <bool HasBase, typename Acc, typename W>
void disjoint_sum(const Expert& expert, const View<W>& view, Block<Acc>& block) {
    const float threshold = expert.threshold, k = expert.score_scale, trim = expert.trim;
    const Acc a = static_cast<Acc>(expert.weight_scale), edit_scale = static_cast<Acc>(expert.edit_scale);
    const W* __restrict w = view.w;
    const float* __restrict h = view.h;
    const Acc* __restrict base = block.base;
    const float* __restrict elected = block.elected;
    Acc* __restrict numerator = block.numerator;
    for (int i = 0; i < view.n; ++i) {
        const float wf = static_cast<float>(w[i]), b = static_cast<float>(base[i]), d = wf - b;
        const bool survives = (score<HasBase>(h[i], wf, b, k) >= threshold) & (std::fabs(d) >= trim);
        const bool agrees = ((d > 0.0f) & (elected[i] > 0.0f)) | ((d < 0.0f) & (elected[i] < 0.0f));
        const Acc edit = a * (edit_scale * (static_cast<Acc>(w[i]) - base[i]));
        numerator[i] += survives & agrees ? edit : Acc(0);
    }
}

template <Power P, typename Acc, typename W>
Found accumulate(const MergeArgs& args, const Expert& expert, const View<W>& view, Block<Acc>& block) {
    const Formula& f = args.formula;
    if (!f.masked) return accumulate<P, false, Mask::none>(f, expert, view, block);
    constexpr Mask kPlain = P == Power::none ? Mask::general : Mask::plain;
    constexpr Mask kOpen = P == Power::none ? Mask::general : Mask::open;
    if (block.counts_keepers)
        return args.has_base ? accumulate<P, true, Mask::general>(f, expert, view, block)
                             : accumulate<P, false, Mask::general>(f, expert, view, block);
    if (args.candidates)
        return args.has_base ? accumulate<P, true, kOpen>(f, expert, view, block)
                             : accumulate<P, false, kOpen>(f, expert, view, block);
    return args.has_base ? accumulate<P, true, kPlain>(f, expert, view, block)
                         : accumulate<P, false, kPlain>(f, expert, view, block);
}

template <typename Acc, typename W>
Found first_pass(const MergeArgs& args, const Expert& expert, const View<W>& view, Block<Acc>& block) {
    const Formula& f = args.formula;
    if (f.elect_signs)
        return args.has_base ? elect<true>(expert, view, block) : elect<false>(expert, view, block);
    if (!f.curvature_weights) return accumulate<Power::none>(args, expert, view, block);
    if (f.power == 0.5) return accumulate<Power::half>(args, expert, view, block);
    if (f.power == 1.0) return accumulate<Power::one>(args, expert, view, block);
    return accumulate<Power::general>(args, expert, view, block);
}

// Calls step with n weights in the narrowest type that loses nothing the result can use.
template <typename Acc, typename Step>
auto with_weights(const Operand& x, int64_t offset, int n, Block<Acc>& block, Step step) {
    using W = Direct<Acc>;
    if (x.dtype == (std::is_same<W, double>::value ? DType::f64 : DType::bf16))
        return step(elements(x.data + static_cast<int64_t>(sizeof(W)) * offset, n, block.direct_room));
    return step(load(x, offset, n, block.weight_room));
}

// n values, followed up to the next multiple of kChunk by `filler`.
template <typename T>
const T* padded(const T* values, int n, T* room, T filler) {
    if (n % kChunk == 0) return values;
    if (values != room) std::memcpy(room, values, sizeof(T) * static_cast<size_t>(n));
    for (int i = n; i % kChunk != 0; ++i) room[i] = filler;
    return room;
}

// Calls step with the expert's view of the block.
template <typename Acc, typename Step>
auto with_view(const MergeArgs& args, int t, int64_t offset, int n, Block<Acc>& block, Step step) {
    const Expert& expert = args.experts[t];
    const float* values = load(expert.curvature, offset, n, block.curvature_room);
    const float* h = padded(values, n, block.curvature_room, NAN);  // no mask keeps a NaN score
    return with_weights(expert.weights, offset, n, block, [&](const auto* w) {
        using W = std::remove_const_t<std::remove_pointer_t<decltype(w)>>;
        View<W> view{n, padded(w, n, room<W>(block), W{}), h, {}, {}};
        view.next_w = Ahead(expert.weights, offset, args.n);
        view.next_h = Ahead(expert.curvature, offset, args.n);
        return step(view);
    });
}

bool count_nonfinite(const float* w, int64_t offset, int n, NonFinite& weights) {
    const int64_t before = weights.count;
    for (int i = 0; i < n; ++i)
        if (!is_finite(w[i])) weights.add(offset + i);
    return weights.count > before;
}

bool count_bad_curvature(const float* h, int64_t offset, int n, NonFinite& curvature) {
    const int64_t before = curvature.count;
    for (int i = 0; i < n; ++i)
        if (!is_curvature(h[i])) curvature.add(offset + i);
    return curvature.count > before;
}

// The block's base as Acc, zeros without one. Returns whether some value is not finite.
template <typename Acc>
bool load_base(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, NonFinite& bad) {
    if (!args.has_base) {
        for (int i = 0; i < n; ++i) block.base[i] = Acc(0);
        return false;
    }
    const Ahead next(args.base, offset, args.n);
    for (int chunk = 0; chunk < n; chunk += kChunk) next.fetch(chunk);
    const uint32_t top = with_weights(args.base, offset, n, block, [&](const auto* w) {
        uint32_t top = 0;
        for (int i = 0; i < n; ++i) {
            block.base[i] = static_cast<Acc>(w[i]);
            top = larger(top, suspicion(static_cast<float>(w[i])));
        }
        return top;
    });
    return top >= kSuspect &&
           count_nonfinite(load(args.base, offset, n, block.weight_room), offset, n, bad);
}

// The mean of the w_t, for elements that nobody keeps.
template <typename Acc>
void mean_of_experts(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, Acc* mean) {
    for (int i = 0; i < n; ++i) mean[i] = Acc(0);
    for (int t = 0; t < args.n_experts; ++t)
        with_weights(args.experts[t].weights, offset, n, block, [&](const auto* w) {
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
    const Acc* __restrict denominator = block.denominator;
    const int32_t* __restrict kept_by = block.kept_by;
    Acc* __restrict numerator = block.numerator;
    int32_t nobody = 0, fallbacks = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t empty = denominator[i] == Acc(0) ? 1 : 0;
        const int32_t none = Counted ? (kept_by[i] == 0 ? 1 : 0) : empty & masked;
        const int32_t fallback = none | empty;
        const Acc merged = base[i] + lambda * (numerator[i] / denominator[i]);
        numerator[i] = fallback ? base[i] : merged;
        nobody += none;
        fallbacks += fallback;
    }
    unkept += nobody;
    return fallbacks;
}

template <typename Acc>
void combine(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    const Formula& f = args.formula;
    const bool counted = block.counts_keepers;
    if (f.denominator != 0)
        for (int i = 0; i < n; ++i) block.denominator[i] = static_cast<Acc>(f.denominator);
    const int32_t fallbacks =
        counted ? quotient<true>(f, n, block, stats.unkept) : quotient<false>(f, n, block, stats.unkept);
    if (fallbacks == 0 || (f.fallback_to_base && args.has_base)) return;
    Acc mean[kBlock];
    mean_of_experts(args, offset, n, block, mean);
    for (int i = 0; i < n; ++i)
        if (block.denominator[i] == Acc(0) || (counted && block.kept_by[i] == 0)) block.merged()[i] = mean[i];
}

// `on_nonfinite: base`: the base value wherever some input of the element is not usable. An expert whose own
// inputs are not usable there does not keep the element. Undecided elements are counted when they are decided.
template <typename Acc>
void repair(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    bool bad[kBlock];
    for (int i = 0; i < n; ++i) bad[i] = !is_finite(static_cast<float>(block.base[i]));
    for (int t = 0; t < args.n_experts; ++t) {
        const Expert& expert = args.experts[t];
        const float* w = load(expert.weights, offset, n, block.weight_room);
        const float* h = load(expert.curvature, offset, n, block.curvature_room);
        for (int i = 0; i < n; ++i) {
            const float b = static_cast<float>(block.base[i]);
            if (is_finite(w[i]) && is_curvature(h[i]) && is_finite(b)) continue;
            bad[i] = true;
            const float s = args.has_base ? score<true>(h[i], w[i], b, expert.score_scale)
                                          : score<false>(h[i], w[i], b, expert.score_scale);
            const bool kept = !args.formula.masked || s >= expert.threshold;
            if (kept && !block.undecided[i]) --stats.kept[t];
        }
    }
    for (int i = 0; i < n; ++i) {
        if (!bad[i]) continue;
        block.merged()[i] = block.base[i];
        if (!block.undecided[i]) ++stats.repaired;
    }
}

// Expert t's score of element i where all its inputs are usable, else 0 (not kept, and without mass).
template <typename Acc>
float usable_score(const MergeArgs& args, int t, float w, float h, Acc base) {
    const float b = static_cast<float>(base), k = args.experts[t].score_scale;
    if (!is_finite(w) || !is_curvature(h) || !is_finite(b)) return 0.0f;
    const float s = args.has_base ? score<true>(h, w, b, k) : score<false>(h, w, b, k);
    return s > 0.0f ? s : 0.0f;  // -0, and a curvature above 2^96 times an edit of 0
}

// Sums the scores of expert t, but those of undecided elements, which `resolve` and `account` count.
template <typename Acc>
void take_census(const MergeArgs& args, int t, int64_t offset, int n, Block<Acc>& block) {
    const Expert& expert = args.experts[t];
    const float* w = load(expert.weights, offset, n, block.weight_room);
    const float* h = load(expert.curvature, offset, n, block.curvature_room);
    for (int i = 0; i < n; ++i)
        if (!block.undecided[i])
            count_score(expert, bit_cast<uint32_t>(usable_score(args, t, w[i], h[i], block.base[i])));
}

// Takes back what undecided elements counted when they were stored.
template <typename Acc>
void uncount_overflow(const MergeArgs& args, int n, const Block<Acc>& block, MergeStats& stats) {
    const Acc limit = static_cast<Acc>(largest_finite(args.out_dtype));
    for (int i = 0; i < n; ++i)
        if (block.undecided[i] && !(std::fabs(block.numerator[i]) <= limit)) --stats.overflow;
}

template <typename Acc>
void clear(Block<Acc>& block, bool elect_signs, bool open) {
    std::memset(block.numerator, 0, sizeof(block.numerator));
    std::memset(block.denominator, 0, sizeof(block.denominator));
    if (elect_signs) std::memset(block.elected, 0, sizeof(block.elected));
    if (elect_signs || block.counts_keepers) std::memset(block.kept_by, 0, sizeof(block.kept_by));
    if (open) std::memset(block.undecided, 0, sizeof(block.undecided));  // else it stays 0
}

// Adds expert t to the sums of the block. Returns whether some input is not usable.
template <typename Acc>
bool add_expert(const MergeArgs& args, int t, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    const Expert& expert = args.experts[t];
    const Found found = with_view(args, t, offset, n, block, [&](const auto& view) {
        return first_pass(args, expert, view, block);
    });
    stats.kept[t] += found.kept;
    if (found.suspicion < kSuspect) return false;
    const float* w = load(expert.weights, offset, n, block.weight_room);
    const float* h = load(expert.curvature, offset, n, block.curvature_room);
    if (!any_nonfinite(w, n) && !any_bad_curvature(h, n)) return false;  // what fills up a chunk
    const bool bad = count_nonfinite(w, offset, n, stats.weights[t]) |
                     count_bad_curvature(h, offset, n, stats.curvature[t]);
    return bad;
}

// One block of at most kBlock elements.
template <typename Acc>
void merge_block(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    bool bad = load_base(args, offset, n, block, stats.base);
    clear(block, args.formula.elect_signs, args.candidates != nullptr);
    for (int t = 0; t < args.n_experts; ++t) bad |= add_expert(args, t, offset, n, block, stats);
    if (args.formula.elect_signs)
        for (int t = 0; t < args.n_experts; ++t)
            with_view(args, t, offset, n, block, [&](const auto& view) {
                const Expert& expert = args.experts[t];
                args.has_base ? disjoint_sum<true>(expert, view, block)
                              : disjoint_sum<false>(expert, view, block);
            });
    if (args.candidates) {
        int32_t at[kBlock + kLanes];
        const int m = positions_of_ones(block.undecided, n, at);
        append(args, offset, at, m);
    }
    for (int t = 0; t < args.n_experts; ++t)
        if (args.experts[t].census) take_census(args, t, offset, n, block);
    combine(args, offset, n, block, stats);
    if (bad && args.formula.repair_nonfinite) repair(args, offset, n, block, stats);
    const int64_t beyond = store(args.out_dtype, args.out, offset, n, block.merged());
    stats.overflow += beyond;
    if (beyond && args.candidates) {
        uncount_overflow(args, n, block, stats);
        args.candidates->overflowed = true;
    }
}

// Merges candidates with thresholds at the ends of the brackets. False where a result overflows.
template <typename Acc>
bool merge_without_undecided(MergeArgs& of, Block<Acc>& block, uint8_t* merged) {
    for (int t = 0; t < of.n_experts; ++t) {
        Expert& expert = of.experts[t];
        if (expert.span) expert.threshold = bit_cast<float>(bit_cast<uint32_t>(expert.threshold) + expert.span);
        expert.span = 0;
        expert.census = nullptr;
    }
    of.out = merged;
    MergeStats unused;
    merge_block(of, 0, static_cast<int>(of.n), block, unused);
    return unused.overflow == 0;
}

// Of n candidates from `offset` on, those that wait for one expert alone become its alternatives; the others
// move up.
template <bool HasBase, typename Acc>
void resolve(const MergeArgs& args, int64_t offset, int n, Block<Acc>& block, MergeStats& stats) {
    Candidates& c = *args.candidates;
    MergeArgs of = operands(args, offset, n);
    Undecided undecided;
    for (int t = 0; t < args.n_experts; ++t) undecided.look<HasBase>(of, t, n);
    uint8_t merged[kBlock * sizeof(double)];
    const bool splits = args.n <= kFlag && !c.overflowed && merge_without_undecided(of, block, merged);
    uint32_t index[kBlock];
    int32_t waits_for[kBlock], flags[kBlock], at[kBlock + kLanes];
    for (int j = 0; j < n; ++j) {
        index[j] = c.index[offset + j] | (undecided.keepers[j] ? 0u : 1u << 31);
        waits_for[j] = splits && undecided.brackets[j] == 1 ? undecided.expert[j] : -1;
    }
    const auto pick_column = [&](const void* column, DType dtype, int m, void* out, int64_t count) {
        pick({static_cast<const uint8_t*>(column), dtype}, 0, at, m,
             static_cast<uint8_t*>(out) + item_size(dtype) * count);
    };
    for (int t = 0; t < args.n_experts; ++t) {
        if (args.experts[t].span == 0) continue;
        for (int j = 0; j < n; ++j) flags[j] = waits_for[j] == t ? 1 : 0;
        const int m = positions_of_ones(flags, n, at);
        Alternatives& a = c.alternatives[t];
        pick_column(index, DType::f32, m, a.index, a.count);
        pick_column(undecided.step, DType::f32, m, a.steps, a.count);
        pick_column(merged, args.out_dtype, m, a.merged, a.count);
        a.count += m;
        stats.kept[t] -= m;
        stats.reached[t] += m;
    }
    for (int t = 0; t < args.n_experts; ++t) {
        if (args.experts[t].census == nullptr) continue;
        const Scores<HasBase> scores(of, t, n);
        for (int j = 0; j < n; ++j)
            if (waits_for[j] >= 0 && waits_for[j] != t)
                count_score(args.experts[t], bit_cast<uint32_t>(scores.used[j]));
    }
    for (int j = 0; j < n; ++j)
        if (waits_for[j] < 0) move(args, offset + j, c.resolved++);
}

template <typename Acc>
void resolve(const MergeArgs& args, int64_t many, Block<Acc>& block, MergeStats& stats) {
    if (args.candidates == nullptr || args.candidates->count - args.candidates->resolved < many) return;
    Candidates& c = *args.candidates;
    for (int64_t offset = c.resolved; offset < c.count; offset += kBlock) {
        const int n = static_cast<int>(c.count - offset < kBlock ? c.count - offset : kBlock);
        args.has_base ? resolve<true>(args, offset, n, block, stats)
                      : resolve<false>(args, offset, n, block, stats);
    }
    c.count = c.resolved;
    c.overflowed = false;
}

// Merges elements from `offset` on as long as `streamed` does. Returns where the first one is that it did not.
template <typename Acc>
int64_t merge_streamed(StreamedSpan streamed, const MergeArgs& args, int64_t offset, Block<Acc>& block,
                       MergeStats& stats) {
    int32_t at[kSpan + kLanes];
    if (streamed != nullptr) resolve(args, 1, block, stats);
    while (streamed != nullptr) {
        const int64_t left = (args.n - offset) / streamed::kStep * streamed::kStep;
        const int n = left < kSpan ? static_cast<int>(left) : kSpan;
        const int undecided = n > 0 ? streamed(args, offset, n, at, stats) : -1;
        if (undecided < 0) break;
        if (undecided > 0) {  // those stay
            append(args, offset, at, undecided);
            args.candidates->resolved = args.candidates->count;
        }
        offset += n;
    }
    return offset;
}

template <typename Acc>
void merge_tile(const MergeArgs& args, MergeStats& stats) {
    Block<Acc> block = {};
    block.counts_keepers = counts_keepers<Acc>(args);
    const bool narrow = std::is_same<Acc, float>::value;
    const StreamedSpan streamed = narrow ? streamed_span(args, block.counts_keepers) : nullptr;
    int64_t offset = 0, retry = 0;  // where streaming is tried again
    while (offset < args.n) {
        if (offset >= retry) {
            offset = merge_streamed(streamed, args, offset, block, stats);
            retry = offset + kSpan;
            continue;
        }
        const int n = static_cast<int>(args.n - offset < kBlock ? args.n - offset : kBlock);
        merge_block(args, offset, n, block, stats);
        resolve(args, kMany, block, stats);
        offset += n;
    }
    resolve(args, 1, block, stats);
    if (args.candidates) account(args, stats);
    for (int t = 0; t < args.n_experts; ++t) stats.reached[t] += stats.kept[t];
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
