// Elements of a tile that some expert's bracket leaves undecided. Blocks append them with their operands; soon,
// while these are in the cache, merge.cpp resolves them: those that wait for one expert alone (nearly all) become
// its alternatives, a fifth of the size; the others stay.
#pragma once

#include "formulas.hpp"

namespace ota {
namespace OTA_ISA {

// Undecided elements after which it is worth resolving them.
constexpr int64_t kMany = 512;

// Elements of a tile whose indices leave the highest bit free.
constexpr int64_t kFlag = int64_t{1} << 31;

constexpr int kLanes = 16;  // of the widest vectors

// Where flags (0 or 1) are 1. flags may be read and `at` written up to kLanes further than n.
inline int positions_of_ones(const int32_t* flags, int n, int32_t* at) {
    int m = 0;
#if defined(__AVX512F__)
    __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int i = 0; i < n; i += kLanes, index = _mm512_add_epi32(index, _mm512_set1_epi32(kLanes))) {
        const __mmask16 inside = _mm512_cmplt_epi32_mask(index, _mm512_set1_epi32(n));
        const __m512i lanes = _mm512_loadu_si512(flags + i);
        const __mmask16 ones = _mm512_mask_test_epi32_mask(inside, lanes, lanes);
        _mm512_storeu_si512(at + m, _mm512_maskz_compress_epi32(ones, index));
        m += __builtin_popcount(ones);
    }
#else
    for (int i = 0; i < n; ++i) {
        at[m] = i;
        m += flags[i];
    }
#endif
    return m;
}

template <typename T>
void pick(const Operand& x, int64_t offset, const int32_t* at, int m, uint8_t* out) {
    const uint8_t* src = x.data + static_cast<int64_t>(sizeof(T)) * offset;
    for (int j = 0; j < m; ++j) std::memcpy(out + sizeof(T) * j, src + sizeof(T) * at[j], sizeof(T));
}

// The elements `at` of a block, as they are stored.
inline void pick(const Operand& x, int64_t offset, const int32_t* at, int m, uint8_t* out) {
    switch (item_size(x.dtype)) {
        case 8: return pick<uint64_t>(x, offset, at, m, out);
        case 4: return pick<uint32_t>(x, offset, at, m, out);
        case 2: return pick<uint16_t>(x, offset, at, m, out);
        default: return pick<uint8_t>(x, offset, at, m, out);
    }
}

// Appends the curvature of the m elements `at` from `offset` on.
inline void pick_curvature(const Curvature& curvature, int64_t offset, int64_t total, const int32_t* at, int m,
                           float* out) {
    float room[kBlock];
    for (int begin = 0, j = 0; j < m; begin += kBlock) {
        const int64_t left = total - offset - begin;
        const float* h = load(curvature, offset + begin, left < kBlock ? static_cast<int>(left) : kBlock, room);
        for (; j < m && at[j] < begin + kBlock; ++j) out[j] = h[at[j] - begin];
    }
}

// Appends the m elements `at` from `offset` on to the candidates.
inline void append(const MergeArgs& args, int64_t offset, const int32_t* at, int m) {
    Candidates& c = *args.candidates;
    for (int j = 0; j < m; ++j) c.index[c.count + j] = static_cast<uint32_t>(offset + at[j]);
    if (args.has_base) pick(args.base, offset, at, m, c.base + item_size(args.base.dtype) * c.count);
    for (int t = 0; t < args.n_experts; ++t) {
        const Expert& expert = args.experts[t];
        pick(expert.weights, offset, at, m, c.weights[t] + item_size(expert.weights.dtype) * c.count);
        if (expert.curvature.kind != CurvatureKind::uniform)
            pick_curvature(expert.curvature, offset, args.n, at, m, c.curvature[t] + c.count);
    }
    c.count += m;
}

// The operands of candidates from `offset` on, as the inputs of a merge of their own.
inline MergeArgs operands(const MergeArgs& args, int64_t offset, int n) {
    const Candidates& c = *args.candidates;
    MergeArgs found;
    found.n = n;
    found.n_experts = args.n_experts;
    found.has_base = args.has_base;
    if (args.has_base) found.base = {c.base + item_size(args.base.dtype) * offset, args.base.dtype};
    found.formula = args.formula;
    found.out_dtype = args.out_dtype;
    for (int t = 0; t < args.n_experts; ++t) {
        Expert& expert = found.experts[t];
        expert = args.experts[t];
        expert.weights.data = c.weights[t] + item_size(expert.weights.dtype) * offset;
        if (expert.curvature.kind == CurvatureKind::uniform) continue;
        expert.curvature = {};
        expert.curvature.kind = CurvatureKind::full;
        expert.curvature.values.data = reinterpret_cast<const uint8_t*>(c.curvature[t] + offset);
    }
    return found;
}

// Moves candidate `from` to `to`.
inline void move(const MergeArgs& args, int64_t from, int64_t to) {
    Candidates& c = *args.candidates;
    const auto copy = [&](uint8_t* column, DType dtype) {
        const int size = item_size(dtype);
        std::memmove(column + size * to, column + size * from, static_cast<size_t>(size));
    };
    c.index[to] = c.index[from];
    if (args.has_base) copy(c.base, args.base.dtype);
    for (int t = 0; t < args.n_experts; ++t) {
        copy(c.weights[t], args.experts[t].weights.dtype);
        if (c.curvature[t] != nullptr) c.curvature[t][to] = c.curvature[t][from];
    }
}

// Adds a score (its bits) that is not in its bracket to the census.
inline void count_score(const Expert& expert, uint32_t bits) {
    const uint32_t first_above = bit_cast<uint32_t>(expert.threshold) + (expert.span ? expert.span : 1);
    const uint32_t exponent = bits >> 23, above = bits >= first_above ? 1 : 0;
    const uint32_t significand = (bits & 0x7fffffu) + (exponent > 0 ? 1u << 23 : 0u);
    expert.census[above * kExponents + exponent] += significand;
    expert.census[2 * kExponents] += above;
}

// Expert t's scores of at most kBlock elements: as the masks have them; `used`: 0 where an input is not usable.
template <bool HasBase>
struct Scores {
    float raw[kBlock], used[kBlock];
    int32_t usable[kBlock];

    Scores(const MergeArgs& of, int t, int n) {
        float base_room[kBlock], weight_room[kBlock], curvature_room[kBlock];
        const Expert& expert = of.experts[t];
        const float* base = HasBase ? load(of.base, 0, n, base_room) : nullptr;
        const float* w = load(expert.weights, 0, n, weight_room);
        const float* h = load(expert.curvature, 0, n, curvature_room);
        for (int j = 0; j < n; ++j) {
            const float b = HasBase ? base[j] : 0.0f, s = score<HasBase>(h[j], w[j], b, expert.score_scale);
            usable[j] = is_finite(w[j]) & is_curvature(h[j]) & is_finite(b);
            raw[j] = s;
            used[j] = usable[j] & (s > 0.0f) ? s : 0.0f;  // as usable_score
        }
    }
};

// What brackets say of at most kBlock candidates.
struct Undecided {
    int32_t brackets[kBlock] = {};  // how many hold a score of the element; more than any where it is not usable
    int32_t expert[kBlock] = {};    // whose, where it is one
    uint32_t step[kBlock] = {};     // how far that score lies above the lowest one
    int32_t keepers[kBlock] = {};   // experts that keep the element for certain

    template <bool HasBase>
    void look(const MergeArgs& of, int t, int n) {
        const Expert& e = of.experts[t];
        const Scores<HasBase> scores(of, t, n);
        const uint32_t lowest = bit_cast<uint32_t>(e.threshold), span = e.span;
        for (int j = 0; j < n; ++j) {
            const uint32_t above = bit_cast<uint32_t>(scores.used[j]) - lowest;
            const int32_t inside = above < span ? 1 : 0, keeps = scores.raw[j] >= e.threshold ? 1 : 0;
            brackets[j] += scores.usable[j] ? inside : kMaxExperts + 1;
            expert[j] += inside ? t : 0;
            step[j] += inside ? above : 0;
            keepers[j] += keeps & ~inside;
        }
    }
};

// What expert t's scores of candidates count: takes back that it kept them.
template <bool HasBase>
void account(const MergeArgs& args, const MergeArgs& of, int t, MergeStats& stats) {
    const Expert& expert = args.experts[t];
    Candidates& c = *args.candidates;
    const int n = static_cast<int>(of.n);
    const Scores<HasBase> scores(of, t, n);
    const float* used = scores.used;
    int32_t kept = 0, reached = 0;
    for (int j = 0; j < n; ++j) {
        kept += scores.raw[j] >= expert.threshold ? 1 : 0;
        reached += used[j] >= expert.threshold ? 1 : 0;
    }
    stats.kept[t] -= kept;
    stats.reached[t] += reached;
    const uint32_t lowest = bit_cast<uint32_t>(expert.threshold), span = expert.span;
    if (span)
        for (int j = 0; j < n; ++j) {
            const uint32_t step = bit_cast<uint32_t>(used[j]) - lowest;
            c.steps[t][c.n_steps[t]] = step;
            c.n_steps[t] += step < span ? 1 : 0;
        }
    if (expert.census)
        for (int j = 0; j < n; ++j)
            if (bit_cast<uint32_t>(used[j]) - lowest >= span) count_score(expert, bit_cast<uint32_t>(used[j]));
}

// The scores of the candidates that stay, when all are there.
inline void account(const MergeArgs& args, MergeStats& stats) {
    const int64_t count = args.candidates->count;
    for (int64_t offset = 0; offset < count; offset += kBlock) {
        const int n = count - offset < kBlock ? static_cast<int>(count - offset) : kBlock;
        const MergeArgs of = operands(args, offset, n);
        for (int t = 0; t < args.n_experts; ++t)
            args.has_base ? account<true>(args, of, t, stats) : account<false>(args, of, t, stats);
    }
}

}  // namespace OTA_ISA
}  // namespace ota
