// The common merge, element by element with all experts' sums in registers: a base, masks or none, weights of
// one type, one kind of curvature to the power 1/2 or 1, a 16-bit result. What it does not take is merge.cpp's,
// and so is any span in which an input is not usable, a result overflows, or an element gets the experts' mean.
// Both do the same operations in the same order: their results are equal bit for bit.
#pragma once

#include "candidates.hpp"
#include "lanes.hpp"

namespace ota {
namespace OTA_ISA {

// Elements that are merged at once. Their inputs are still in the second-level cache when those of undecided
// elements are picked.
constexpr int kSpan = 4 * kBlock;

// Merges n elements from `offset` on, adds what they count to `stats` and the alternatives that they have to
// those of the tile, and writes where the other undecided ones are, relative to `offset`, to `at` (room for n and
// 16 more). Returns their number, or -1 where it is for merge.cpp.
using StreamedSpan = int (*)(const MergeArgs& args, int64_t offset, int n, int32_t* at, MergeStats& stats);

#if defined(OTA_LANES)

namespace streamed {

using namespace lanes;

constexpr int kStep = kVectors * OTA_LANES;  // a span is a whole number of steps
constexpr int kAhead = 128;                  // elements between what is read and what is fetched

enum class Masks { none, closed, open };

// Element types: a vector from element i on.
struct BF16 {
    static constexpr int size = 2;
    static Floats read(const uint8_t* p, int i) {
        return floats(left<16>(widen(reinterpret_cast<const uint16_t*>(p) + i)));
    }
};
struct F16 {
    static constexpr int size = 2;
    static Floats read(const uint8_t* p, int i) { return load_f16(reinterpret_cast<const uint16_t*>(p) + i); }
};
struct F32 {
    static constexpr int size = 4;
    static Floats read(const uint8_t* p, int i) { return load(reinterpret_cast<const float*>(p) + i); }
};
// log8: as `level`.
struct Codes {
    static constexpr int size = 1;
    static Floats read(const uint8_t* p, int i) {
        constexpr uint32_t top = 64u << 23;
        const Bits c = widen(p + i);
        const Bits of_quarter = look_up(c, top, top - (8u << 16), top - (11u << 16), top - (9u << 16));
        return zero_where(is_zero(c), floats(add(left<21>(c), of_quarter)));
    }
};

// Curvature: as it is stored, or times a number of the row.
template <typename T>
struct Plain : T {
    static Floats curvature(const uint8_t* p, int i, float) { return T::read(p, i); }
};
template <typename T>
struct Scaled : T {
    static Floats curvature(const uint8_t* p, int i, float row) { return mul(T::read(p, i), all(row)); }
};

// The brackets that hold a score of an element, in one number: the sum of kBracket + t kExpert over their experts t,
// and below kExpert where the element is.
constexpr uint32_t kExpert = kSpan, kBracket = kExpert << 11;
static_assert(kMaxExperts * (kMaxExperts - 1) / 2 < 1 << 11, "the numbers of all experts fit");
static_assert((int64_t{kMaxExperts} + 1) * kBracket <= int64_t{1} << 32, "the count of all experts fits");

// One expert. w, h: element 0 of the span (h of rank-1 curvature: its column); row: its number of this row.
struct Stream {
    const uint8_t *w, *h;
    float row, threshold, end, k, weight_scale;  // end: the first number above the bracket
    uint32_t bracket;                            // kBracket + t kExpert
    int32_t kept;
};

// What a span found. top, top_merged: the largest suspicion of the inputs, and magnitude of the results.
struct Seen {
    Bits top = all(0u), top_merged = all(0u);
    int32_t zeros = 0;  // elements whose weights sum to 0
};

// The elements of a span that some bracket leaves undecided, one after the other, and what they come to where
// undecided experts drop them.
struct Waiting {
    static constexpr int kRoom = kSpan + OTA_LANES;
    int count = 0;
    uint32_t brackets[kRoom], score[kRoom];  // at first, the position alone; score: of the last expert that waits
    uint32_t base[kRoom], numerator[kRoom], denominator[kRoom];
};

// Into the first-level cache: a dozen streams are too many for the hardware's own prefetchers.
template <typename T, int Elements>
inline void fetch(const uint8_t* p, int i) {
    for (int byte = 0; byte < Elements * T::size; byte += 64)
        __builtin_prefetch(p + (i + kAhead) * T::size + byte, 0, 3);
}

inline Bits magnitude(Floats x) { return both(bits(x), all(0x7fffffffu)); }

// As `saliency` and `weight` (formulas.hpp).
inline Floats score(const Stream& x, Floats h, Floats d) {
    const Floats scaled = mul(d, all(65536.0f));
    return mul(mul(h, all(x.k)), mul(scaled, scaled));
}
template <Power P>
Floats weight(const Stream& x, Floats h, Floats epsilon) {
    return fma(P == Power::half ? sqrt(h) : h, all(x.weight_scale), epsilon);
}

// Elements [begin, end) of the span. Undecided experts keep theirs; where such elements are goes to `waiting`.
template <Masks M, Power P, typename W, typename H>
Seen run(const MergeArgs& args, const uint8_t* base, Stream* streams, int begin, int end, uint8_t* out,
         Waiting* waiting, Seen seen) {
    constexpr int V = kVectors;
    const Floats epsilon = all(static_cast<float>(args.formula.epsilon));
    const Floats lambda = all(static_cast<float>(args.formula.lambda));
    const int n_streams = args.n_experts;
    const bool to_bf16 = args.out_dtype == DType::bf16;
    for (int i = begin; i < end; i += kStep) {
        Floats b[V], numerator[V], denominator[V];
        Mask waits[V];
        fetch<W, kStep>(base, i);
        for (int v = 0; v < V; ++v) {
            b[v] = W::read(base, i + v * OTA_LANES);
            numerator[v] = denominator[v] = all(0.0f);
            waits[v] = nowhere();
            if (M == Masks::none) seen.top = larger(seen.top, magnitude(b[v]));
        }
        for (int t = 0; t < n_streams; ++t) {
            Stream& x = streams[t];
            fetch<W, kStep>(x.w, i);
            fetch<H, kStep>(x.h, i);
            Mask keep[V];
            for (int v = 0; v < V; ++v) {
                const int j = i + v * OTA_LANES;
                const Floats w = W::read(x.w, j), h = H::curvature(x.h, j, x.row), d = sub(w, b[v]);
                Floats p = weight<P>(x, h, epsilon);
                if (M == Masks::none) {
                    seen.top = larger(seen.top, larger(magnitude(w), bits(h)));
                } else {
                    const Floats s = score(x, h, d);
                    keep[v] = at_least(s, all(x.threshold));
                    p = zero_unless(keep[v], p);
                    seen.top = larger(seen.top, bits(s));  // usable inputs have a score that is a number >= 0
                    if (M == Masks::open) waits[v] = either(waits[v], not_at_least(keep[v], s, all(x.end)));
                }
                denominator[v] = add(denominator[v], p);
                numerator[v] = fma(p, d, numerator[v]);
            }
            if (M != Masks::none) x.kept += count<V>(keep);
        }
        Mask zero[V];
        for (int v = 0; v < V; ++v) {
            const int j = i + v * OTA_LANES;
            zero[v] = is_zero(denominator[v]);
            const Floats edit = mul(lambda, div(numerator[v], denominator[v]));
            const Floats merged = choose(zero[v], b[v], add(b[v], edit));
            seen.top_merged = larger(seen.top_merged, magnitude(merged));
            if (to_bf16)
                store_bf16(reinterpret_cast<uint16_t*>(out) + j, merged);
            else
                store_f16(reinterpret_cast<uint16_t*>(out) + j, merged);
            if (M == Masks::open) {
                write(waits[v], from(j), waiting->brackets + waiting->count);
                waiting->count += count(waits[v]);
            }
        }
        seen.zeros += count<V>(zero);
    }
    return seen;
}

// The elements `at` of an input, one after the other.
template <typename T>
void pick(const uint8_t* p, const uint32_t* at, uint8_t* out) {
    for (int j = 0; j < OTA_LANES; ++j)
        std::memcpy(out + T::size * j, p + int64_t{T::size} * at[j], T::size);
}

// Sums once more what waits, from number `first` on, without undecided experts. Their inputs are still in the
// second-level cache. Second sums of all elements would take longer, unless more than a twentieth of them waited
// (AVX-512; AVX2: a quarter).
template <Power P, typename W, typename H>
void sum_without_undecided(const MergeArgs& args, const uint8_t* base, const Stream* streams, int first,
                           Waiting& waiting) {
    const Floats epsilon = all(static_cast<float>(args.formula.epsilon));
    if (waiting.count == first) return;
    for (int j = 0; j < OTA_LANES; ++j)  // whole vectors
        waiting.brackets[waiting.count + j] = waiting.brackets[waiting.count - 1];
    for (int i = first; i < waiting.count; i += OTA_LANES) {
        uint32_t at[OTA_LANES];
        uint8_t picked_w[OTA_LANES * W::size], picked_h[OTA_LANES * H::size];
        std::memcpy(at, waiting.brackets + i, sizeof(at));
        pick<W>(base, at, picked_w);
        const Floats b = W::read(picked_w, 0);
        Floats numerator = all(0.0f), denominator = all(0.0f), last = all(0.0f);
        Bits brackets = load(at);
        for (int t = 0; t < args.n_experts; ++t) {
            const Stream& x = streams[t];
            pick<W>(x.w, at, picked_w);
            pick<H>(x.h, at, picked_h);
            const Floats h = H::curvature(picked_h, 0, x.row), d = sub(W::read(picked_w, 0), b), s = score(x, h, d);
            const Mask keep = at_least(s, all(x.threshold)), inside = not_at_least(keep, s, all(x.end));
            const Floats p = zero_unless(without(keep, inside), weight<P>(x, h, epsilon));
            denominator = add(denominator, p);
            numerator = fma(p, d, numerator);
            last = choose(inside, s, last);
            brackets = add_where(inside, brackets, all(x.bracket));
        }
        store(waiting.brackets + i, brackets);
        store(waiting.score + i, bits(last));
        store(waiting.base + i, bits(b));
        store(waiting.numerator + i, bits(numerator));
        store(waiting.denominator + i, bits(denominator));
    }
}

// Those elements that wait for one expert alone become its alternatives, as merge.cpp's `resolve` has it. Writes
// where the others are to `at`; returns their number.
inline int split(const MergeArgs& args, int64_t offset, const Stream* streams, const Waiting& found, int32_t* at,
                 MergeStats& stats) {
    const Floats lambda = all(static_cast<float>(args.formula.lambda));
    const Bits limit = all(bit_cast<uint32_t>(static_cast<float>(largest_finite(args.out_dtype))));
    const bool to_bf16 = args.out_dtype == DType::bf16;
    int n_others = 0;
    for (int i = 0; i < found.count; i += OTA_LANES) {
        const Mask valid = first_lanes(found.count - i < OTA_LANES ? found.count - i : OTA_LANES);
        const Bits brackets = load(found.brackets + i), score = load(found.score + i);
        const Bits where = both(brackets, all(kExpert - 1)), experts = sub(brackets, where);
        const Floats b = floats(load(found.base + i)), denominator = floats(load(found.denominator + i));
        const Mask zero = is_zero(denominator);
        const Floats edit = mul(lambda, div(floats(load(found.numerator + i)), denominator));
        const Floats merged = choose(zero, b, add(b, edit));
        const Mask several = above(brackets, all(2 * kBracket - 1));
        const Mask stays = either(several, above(magnitude(merged), limit));
        const Mask splits = args.n > kFlag ? nowhere() : without(valid, stays);
        const Bits index = either(add(where, all(static_cast<uint32_t>(offset))), lanes::left<31>(ones_where(zero)));
        const Bits value = to_bf16 ? bf16_of(merged) : f16_of(merged);
        for (int t = 0; t < args.n_experts; ++t) {
            const Mask waits = both(equal(experts, all(streams[t].bracket)), splits);
            if (lanes_of(waits) == 0) continue;
            Alternatives& a = args.candidates->alternatives[t];
            const int n = count(waits);
            write(waits, index, a.index + a.count);
            write(waits, sub(score, bits(all(streams[t].threshold))), a.steps + a.count);
            write_low_halves(waits, value, reinterpret_cast<uint16_t*>(a.merged) + a.count);
            a.count += n;
            stats.kept[t] -= n;
            stats.reached[t] += n;
        }
        const Mask others = without(valid, splits);
        write(others, where, reinterpret_cast<uint32_t*>(at) + n_others);
        n_others += count(others);
    }
    return n_others;
}

// Calls step(begin, end, row, column) for what n elements have of each row.
template <typename Step>
void by_rows(const Curvature& c, int64_t offset, int n, Step step) {
    int64_t row = (c.start + offset) / c.n_columns, column = (c.start + offset) % c.n_columns;
    for (int begin = 0, end; begin < n; begin = end, ++row, column = 0) {
        const int64_t left = c.n_columns - column;
        end = left < n - begin ? begin + static_cast<int>(left) : n;
        step(begin, end, row, column);
    }
}

template <Masks M, Power P, typename W, typename H>
int merge_span(const MergeArgs& args, int64_t offset, int n, int32_t* at, MergeStats& stats) {
    const int n_experts = args.n_experts;
    Stream streams[kMaxExperts];
    for (int t = 0; t < n_experts; ++t) {
        const Expert& e = args.experts[t];
        const Curvature& c = e.curvature;
        const uint8_t* h = c.kind == CurvatureKind::log8 ? c.codes + offset : c.values.data + offset * H::size;
        const float end = bit_cast<float>(bit_cast<uint32_t>(e.threshold) + e.span);
        streams[t] = {e.weights.data + offset * W::size, h, 0.0f, e.threshold, end, e.score_scale,
                      static_cast<float>(e.weight_scale), kBracket + kExpert * static_cast<uint32_t>(t), 0};
    }
    const uint8_t* base = args.base.data + offset * W::size;
    uint8_t* out = args.out + offset * item_size(args.out_dtype);
    const Curvature& first = args.experts[0].curvature;
    Seen seen;
    Waiting waiting;
    const auto piece = [&](int begin, int end) {
        const int first = waiting.count;
        seen = run<M, P, W, H>(args, base, streams, begin, end, out, &waiting, seen);
        if (M == Masks::open) sum_without_undecided<P, W, H>(args, base, streams, first, waiting);
    };
    if (first.kind == CurvatureKind::full)
        piece(0, n);
    else
        by_rows(first, offset, n, [&](int begin, int end, int64_t row, int64_t column) {
            for (int t = 0; t < n_experts; ++t) {
                const Curvature& c = args.experts[t].curvature;
                streams[t].row = c.rows[row];
                if (c.kind == CurvatureKind::rank1)
                    streams[t].h = reinterpret_cast<const uint8_t*>(c.columns + column - begin);
            }
            piece(begin, end);
        });
    const uint32_t limit = bit_cast<uint32_t>(static_cast<float>(largest_finite(args.out_dtype)));
    const bool mean_wanted = seen.zeros != 0 && !args.formula.fallback_to_base;
    if (largest(seen.top) >= kSuspect || largest(seen.top_merged) > limit || mean_wanted) return -1;
    for (int t = 0; t < n_experts; ++t) stats.kept[t] += M == Masks::none ? n : streams[t].kept;
    if (M != Masks::none) stats.unkept += seen.zeros;
    return split(args, offset, streams, waiting, at, stats);
}

template <Masks M, Power P, typename W>
StreamedSpan of_curvature(const Curvature& c) {
    switch (c.kind) {
        case CurvatureKind::rank1: return merge_span<M, P, W, Scaled<F32>>;
        case CurvatureKind::log8: return merge_span<M, P, W, Scaled<Codes>>;
        case CurvatureKind::full:
            if (c.values.dtype == DType::f32) return merge_span<M, P, W, Plain<F32>>;
            return c.values.dtype == DType::bf16 ? merge_span<M, P, W, Plain<BF16>> : nullptr;
        default: return nullptr;
    }
}

template <Masks M, Power P>
StreamedSpan of_weights(const Expert& e) {
    switch (e.weights.dtype) {
        case DType::bf16: return of_curvature<M, P, BF16>(e.curvature);
        case DType::f16: return of_curvature<M, P, F16>(e.curvature);
        case DType::f32: return of_curvature<M, P, F32>(e.curvature);
        default: return nullptr;
    }
}

template <Masks M>
StreamedSpan of_power(const MergeArgs& args) {
    if (args.formula.power == 0.5) return of_weights<M, Power::half>(args.experts[0]);
    return args.formula.power == 1.0 ? of_weights<M, Power::one>(args.experts[0]) : nullptr;
}

// Whether all inputs are read in one way, in whole steps of one row.
inline bool are_alike(const MergeArgs& args) {
    const Expert& first = args.experts[0];
    bool alike = args.base.dtype == first.weights.dtype;
    for (int t = 0; t < args.n_experts; ++t) {
        const Expert& e = args.experts[t];
        const Curvature& c = e.curvature;
        alike &= e.weights.dtype == first.weights.dtype && c.kind == first.curvature.kind &&
                 c.values.dtype == first.curvature.values.dtype;
        alike &= c.start == first.curvature.start && c.n_columns == first.curvature.n_columns;
        alike &= c.kind == CurvatureKind::full || (c.start % kStep == 0 && c.n_columns % kStep == 0);
    }
    return alike;
}

}  // namespace streamed

// The function that merges spans of such a tile, whole steps at a time; none where merge.cpp must.
inline StreamedSpan streamed_span(const MergeArgs& args, bool counts_keepers) {
    using namespace streamed;
    const Formula& f = args.formula;
    bool census = false;
    for (int t = 0; t < args.n_experts; ++t) census |= args.experts[t].census != nullptr;
    const bool sums_weights = f.curvature_weights && f.denominator == 0 && !f.elect_signs && !counts_keepers;
    if (!args.has_base || !sums_weights || census || !are_alike(args)) return nullptr;
    if (!f.masked) return of_power<Masks::none>(args);
    if (!f.fallback_to_base) return nullptr;  // nearly every span has an element that nobody keeps
    return args.candidates ? of_power<Masks::open>(args) : of_power<Masks::closed>(args);
}

#else

namespace streamed {
constexpr int kStep = kBlock;
}

inline StreamedSpan streamed_span(const MergeArgs&, bool) { return nullptr; }

#endif

}  // namespace OTA_ISA
}  // namespace ota
