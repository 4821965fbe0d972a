// The common merge of many strips at once, in registers: a base, saliencies that reach a threshold, weights of one type, one kind
// of curvature to the power 1/2 or 1, a 16-bit result. With intrinsics, because the compiler does not vectorise a loop
// over experts inside of the loop over elements: plain loops took 1.2 to 1.9 times the time. The operations and their
// order are those of stages.hpp: results are equal bit for bit.
#pragma once

#include "add.hpp"
#include "census.hpp"

namespace ota {
namespace OTA_ISA {

// Merges n elements from `offset` on, whole strips: writes its results, adds what it counts to `stats` and the censuses, and
// the elements in brackets to `waiting`. False, and nothing counted, where they have to go through all
// steps: an input is not usable, or a result is beyond the output's type.
using InRegisters = bool (*)(const MergeArgs& args, int64_t offset, int n, MergeStats& stats, Waiting& waiting);

#if defined(OTA_LANES)

namespace lanes {

// Curvature: as it is stored, or times a number of the row.
template <typename T>
struct Plain : T {
    static Floats curvature(const uint8_t* p, int i, float) { return T::read(p, i); }
};
template <typename T>
struct Scaled : T {
    static Floats curvature(const uint8_t* p, int i, float row) { return mul(T::read(p, i), all(row)); }
};

// One expert. w, h: element 0 of the strips (h of rank-1 curvature: its column); row: its number of this row; end: the
// first number above the bracket.
struct Stream {
    const uint8_t *w, *h;
    float row, threshold, end, k, weight_scale;
    int32_t kept;
};

// What some strips found. top, top_merged: the largest suspicion of the inputs, and magnitude of the results.
struct Seen {
    Bits top = all(0u), top_merged = all(0u);
    int32_t zeros = 0;  // elements whose weights sum to 0
};

// Into the first-level cache: a dozen streams are too many for the hardware's own prefetchers.
template <typename T>
inline void fetch(const uint8_t* p, int i) {
    for (int byte = 0; byte < kStep * T::size; byte += 64)
        __builtin_prefetch(p + (i + kAhead) * T::size + byte, 0, 3);
}

// Elements [begin, end) from `offset` on. Undecided experts keep theirs. Open: some are undecided, or have a census
// (`censuses`, else none).
template <bool Open, Form F, typename W, typename H>
void run(const MergeArgs& args, int64_t offset, Stream* streams, int begin, int end, Waiting& waiting,
         Censuses* censuses, Seen& result) {
    constexpr int V = kVectors;
    const uint8_t* base = args.tile.base.data + offset * W::size;
    auto* out = reinterpret_cast<uint16_t*>(args.out) + offset;
    const Floats epsilon = all(static_cast<float>(args.tile.numbers.epsilon));
    const Floats lambda = all(static_cast<float>(args.tile.numbers.lambda));
    const int n_streams = args.tile.n_experts;
    const bool to_bf16 = args.out_dtype == DType::bf16;
    Seen seen = result;
    for (int i = begin; i < end; i += kStep) {
        Floats b[V], numerator[V], denominator[V];
        Mask waits[V];
        fetch<W>(base, i);
        for (int v = 0; v < V; ++v) {
            b[v] = W::read(base, i + v * OTA_LANES);
            numerator[v] = denominator[v] = all(0.0f);
            waits[v] = nowhere();
        }
        for (int t = 0; t < n_streams; ++t) {
            Stream& x = streams[t];
            fetch<W>(x.w, i);
            fetch<H>(x.h, i);
            Mask keep[V];
            Floats scores[V];
            for (int v = 0; v < V; ++v) {
                const int j = i + v * OTA_LANES;
                const Floats w = W::read(x.w, j), h = H::curvature(x.h, j, x.row), d = sub(w, b[v]);
                const Floats scaled = mul(d, all(65536.0f)), s = mul(mul(h, all(x.k)), mul(scaled, scaled));
                keep[v] = at_least(s, all(x.threshold));
                scores[v] = s;
                const Floats p =
                    zero_unless(keep[v], fma(F == Form::root ? sqrt(h) : h, all(x.weight_scale), epsilon));
                seen.top = larger(seen.top, bits(s));  // usable inputs have a score that is a number >= 0
                if (Open) waits[v] = either(waits[v], not_at_least(keep[v], s, all(x.end)));
                denominator[v] = add(denominator[v], p);
                numerator[v] = fma(p, d, numerator[v]);
            }
            x.kept += __builtin_popcountll(joined(keep));
            if (Open && censuses != nullptr && censuses->has(t)) censuses->add<V>(t, scores);
        }
        Mask zero[V];
        for (int v = 0; v < V; ++v) {
            const int j = i + v * OTA_LANES;
            zero[v] = is_zero(denominator[v]);
            const Floats edit = mul(lambda, div(numerator[v], denominator[v]));
            const Floats merged = choose(zero[v], b[v], add(b[v], edit));
            seen.top_merged = larger(seen.top_merged, magnitude(merged));
            if (to_bf16)
                store_low_halves(out + j, bf16_of(merged));
            else
                store_f16(out + j, merged);
        }
        seen.zeros += __builtin_popcountll(joined(zero));
        if (Open)
            for (uint64_t rest = joined(waits); rest != 0; rest &= rest - 1)
                waiting.at[waiting.count++] = static_cast<uint32_t>(offset + i + __builtin_ctzll(rest));
    }
    result = seen;
}

template <bool Open, Form F, typename W, typename H>
bool merge_all(const MergeArgs& args, int64_t offset, int n, MergeStats& stats, Waiting& waiting, Censuses* censuses) {
    const Tile& tile = args.tile;
    const Curvature& first = tile.experts[0].curvature;
    Stream streams[kMaxExperts];
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        const Curvature& c = e.curvature;
        const uint8_t* h = c.kind == CurvatureKind::log8 ? c.codes + offset : c.values.data + offset * H::size;
        const float end = bit_cast<float>(bit_cast<uint32_t>(e.threshold) + e.span);
        streams[t] = {e.weights.data + offset * W::size,      h, 0.0f, e.threshold, end, e.score_scale,
                      static_cast<float>(e.weight_scale), 0};
    }
    const int before = waiting.count;
    Seen seen;
    if (first.kind == CurvatureKind::full)
        run<Open, F, W, H>(args, offset, streams, 0, n, waiting, censuses, seen);
    else
        by_rows({first.start + offset, nullptr, first.n_columns}, n, [&](int begin, int end, int64_t row, int64_t column) {
            for (int t = 0; t < tile.n_experts; ++t) {
                const Curvature& c = tile.experts[t].curvature;
                streams[t].row = c.rows[row];
                if (c.kind == CurvatureKind::rank1)
                    streams[t].h = reinterpret_cast<const uint8_t*>(c.columns + column - begin);
            }
            run<Open, F, W, H>(args, offset, streams, begin, end, waiting, censuses, seen);
        });
    const uint32_t limit = bit_cast<uint32_t>(static_cast<float>(largest_finite(args.out_dtype)));
    const bool counted = censuses == nullptr || censuses->are_whole();
    if (largest(seen.top) >= kSuspect || largest(seen.top_merged) > limit || !counted) {
        waiting.count = before;
        return false;
    }
    for (int t = 0; t < tile.n_experts; ++t) stats.kept[t] += streams[t].kept;
    stats.unkept += seen.zeros;
    if (censuses != nullptr) censuses->finish();
    return true;
}

template <Form F, typename W, typename H>
bool merge_counted(const MergeArgs& args, int64_t offset, int n, MergeStats& stats, Waiting& waiting) {
    Censuses censuses(args.tile);
    return merge_all<true, F, W, H>(args, offset, n, stats, waiting, &censuses);
}

template <bool Open, Form F, typename W, typename H>
bool merge(const MergeArgs& args, int64_t offset, int n, MergeStats& stats, Waiting& waiting) {
    if (Open && has_censuses(args.tile)) return merge_counted<F, W, H>(args, offset, n, stats, waiting);
    return merge_all<Open, F, W, H>(args, offset, n, stats, waiting, nullptr);
}

template <bool Open, Form F, typename W>
InRegisters of_curvature(const Curvature& c) {
    switch (c.kind) {
        case CurvatureKind::rank1: return merge<Open, F, W, Scaled<F32>>;
        case CurvatureKind::log8: return merge<Open, F, W, Scaled<Codes>>;
        case CurvatureKind::full:
            if (c.values.dtype == DType::f32) return merge<Open, F, W, Plain<F32>>;
            return c.values.dtype == DType::bf16 ? merge<Open, F, W, Plain<BF16>> : nullptr;
        default: return nullptr;
    }
}

template <bool Open, Form F>
InRegisters of_weights(const Expert& e) {
    switch (e.weights.dtype) {
        case DType::bf16: return of_curvature<Open, F, BF16>(e.curvature);
        case DType::f16: return of_curvature<Open, F, F16>(e.curvature);
        case DType::f32: return of_curvature<Open, F, F32>(e.curvature);
        default: return nullptr;
    }
}

// Whether all inputs are read in one way, in whole steps of one row.
inline bool are_alike(const Tile& tile) {
    const Expert& first = tile.experts[0];
    bool alike = tile.base.dtype == first.weights.dtype;
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        const Curvature& c = e.curvature;
        alike &= e.weights.dtype == first.weights.dtype && c.kind == first.curvature.kind &&
                 c.values.dtype == first.curvature.values.dtype;
        alike &= c.start == first.curvature.start && c.n_columns == first.curvature.n_columns;
        alike &= c.kind == CurvatureKind::full || (c.start % kStep == 0 && c.n_columns % kStep == 0);
    }
    return alike;
}

// Every kept P is at least epsilon > 0, so that D is 0 exactly where nobody keeps the element.
inline bool is_common(const Tile& tile) {
    const Words& words = tile.words;
    const Numbers& x = tile.numbers;
    bool common = words.edit == Edit::difference && words.score == Score::saliency && words.select == Select::at_least &&
                  words.elect == Elect::none && words.weigh == Weigh::curvature && words.divide == Divide::kept_weights;
    common &= tile.has_base() && static_cast<float>(x.epsilon) > 0 && (x.power == 0.5 || x.power == 1.0);
    common &= x.least == 0 && !x.zero_is_one && x.fallback_to_base;
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        common &= e.origin.data == nullptr && e.first <= 0 && e.last == kLastIndex && !(e.trim > 0);
        common &= e.weight_scale >= 0 && e.edit_scale == 1;
    }
    return common;
}

}  // namespace lanes

// The function that merges whole strips of such a tile; none where they have to go through all steps.
inline InRegisters salient(const MergeArgs& args, bool open) {
    using namespace lanes;
    const Tile& tile = args.tile;
    open |= has_censuses(tile);
    const bool narrow = args.out_dtype == DType::bf16 || args.out_dtype == DType::f16;
    if (!narrow || !is_common(tile) || !are_alike(tile)) return nullptr;
    const Expert& e = tile.experts[0];
    if (tile.numbers.power == 1.0) return open ? of_weights<true, Form::linear>(e) : of_weights<false, Form::linear>(e);
    return open ? of_weights<true, Form::root>(e) : of_weights<false, Form::root>(e);
}

#else

inline InRegisters salient(const MergeArgs&, bool) { return nullptr; }

#endif

}  // namespace OTA_ISA
}  // namespace ota
