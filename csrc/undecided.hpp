// Elements of a tile that some expert's bracket leaves undecided, and the lists that hold them.
#pragma once

#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

// Elements of a tile whose indices leave the highest bit free.
constexpr int64_t kFlag = int64_t{1} << 31;

// Elements that the common merge takes at once.
constexpr int kSpan = 16 * kStrip;

// Undecided elements that have yet to be resolved: while their inputs are in the second-level cache, and enough of
// them for whole vectors.
struct Waiting {
    static constexpr int kMany = 192;
    int count = 0;
    uint32_t at[kMany + kSpan];

    // Appends where flags of a strip (0 or 1, of which there are kSpare more) are 1.
    void add(const int32_t* flags, int64_t offset, int n) {
        const auto first = static_cast<uint32_t>(offset);
#if defined(__AVX512F__)
        __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                         _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
        for (int i = 0; i < n; i += 16, index = _mm512_add_epi32(index, _mm512_set1_epi32(16))) {
            const __m512i lanes = _mm512_loadu_si512(flags + i);
            __mmask16 ones = _mm512_test_epi32_mask(lanes, lanes);
            if (n - i < 16) ones = static_cast<__mmask16>(ones & ((1u << (n - i)) - 1u));
            for (uint32_t rest = ones; rest != 0; rest &= rest - 1)
                at[count++] = first + static_cast<uint32_t>(i + __builtin_ctz(rest));
        }
#else
        for (int i = 0; i < n; i += 8) {
            int32_t some = 0;
            for (int j = 0; j < 8; ++j) some |= flags[i + j];
            for (int j = 0; some && j < 8 && i + j < n; ++j)
                if (flags[i + j]) at[count++] = first + static_cast<uint32_t>(i + j);
        }
#endif
    }
};

template <typename T>
void pick(const uint8_t* src, const uint32_t* at, int m, uint8_t* out) {
    for (int j = 0; j < m; ++j) std::memcpy(out + sizeof(T) * j, src + sizeof(T) * at[j], sizeof(T));
}

// The elements `at` of an input, as they are stored.
inline void pick(const Operand& x, const uint32_t* at, int m, uint8_t* out) {
    switch (item_size(x.dtype)) {
        case 8: return pick<uint64_t>(x.data, at, m, out);
        case 4: return pick<uint32_t>(x.data, at, m, out);
        case 2: return pick<uint16_t>(x.data, at, m, out);
        default: return pick<uint8_t>(x.data, at, m, out);
    }
}

inline void pick(const Curvature& c, const uint32_t* at, int m, float* out) {
    if (c.kind == CurvatureKind::full) {
        uint8_t stored[kStrip * sizeof(float)];
        pick(c.values, at, m, stored);
        const float* h = load(Operand{stored, c.values.dtype}, 0, m, out);
        if (h != out) std::memcpy(out, h, sizeof(float) * static_cast<size_t>(m));
        return;
    }
    for (int j = 0; j < m; ++j) {
        const float* h = load(c, at[j], 1, out + j);
        out[j] = *h;
    }
}

// Appends the elements `at` of a tile to the candidates.
inline void append(const Tile& tile, const uint32_t* at, int m, Candidates& c) {
    std::memcpy(c.index + c.count, at, sizeof(*at) * static_cast<size_t>(m));
    const auto column = [&](const Operand& x, uint8_t* out) {
        if (x.data != nullptr) pick(x, at, m, out + item_size(x.dtype) * c.count);
    };
    column(tile.base, c.base);
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        column(e.weights, c.weights[t]);
        column(e.origin, c.origins[t]);
        if (e.curvature.kind != CurvatureKind::uniform) pick(e.curvature, at, m, c.curvature[t] + c.count);
    }
    c.count += m;
}

// Makes `found`, a copy of the tile, one of the candidates [from, from + m). index: room for where they lie in their
// tensor.
inline void point_at(const Tile& tile, const Candidates& c, int64_t from, int m, int64_t* index, Tile& found) {
    found.n = m;
    for (int j = 0; j < m; ++j) {
        const int64_t at = c.index[from + j];
        index[j] = tile.index != nullptr ? tile.index[at] : tile.start + at;
    }
    found.index = index;
    const auto point = [&](Operand& x, const uint8_t* column) {
        if (x.data != nullptr) x.data = column + item_size(x.dtype) * from;
    };
    point(found.base, c.base);
    for (int t = 0; t < tile.n_experts; ++t) {
        Expert& e = found.experts[t];
        point(e.weights, c.weights[t]);
        point(e.origin, c.origins[t]);
        if (e.curvature.kind == CurvatureKind::uniform) continue;
        e.curvature = {};
        e.curvature.kind = CurvatureKind::full;
        e.curvature.values.data = reinterpret_cast<const uint8_t*>(c.curvature[t] + from);
    }
}

// Moves candidate `from` to `to`.
inline void move(const Tile& tile, Candidates& c, int64_t from, int64_t to) {
    const auto copy = [&](const Operand& x, uint8_t* column) {
        const int size = item_size(x.dtype);
        if (x.data != nullptr) std::memmove(column + size * to, column + size * from, static_cast<size_t>(size));
    };
    c.index[to] = c.index[from];
    copy(tile.base, c.base);
    for (int t = 0; t < tile.n_experts; ++t) {
        copy(tile.experts[t].weights, c.weights[t]);
        copy(tile.experts[t].origin, c.origins[t]);
        if (c.curvature[t] != nullptr) c.curvature[t][to] = c.curvature[t][from];
    }
}

// The same tile with thresholds at the ends of the brackets: nobody keeps what is undecided.
inline void close_brackets(Tile& tile) {
    for (int t = 0; t < tile.n_experts; ++t) {
        Expert& e = tile.experts[t];
        if (e.span) e.threshold = bit_cast<float>(bit_cast<uint32_t>(e.threshold) + e.span);
        e.span = 0;
        e.census = nullptr;
    }
}

inline void flag_undecided(const float* __restrict s, const Expert& e, int n, int32_t* __restrict waits) {
    const uint32_t lowest = bit_cast<uint32_t>(e.threshold), span = e.span;
    for (int i = 0; i < n; ++i) waits[i] |= bit_cast<uint32_t>(s[i]) - lowest < span ? 1 : 0;
}

// Adds scores (as they are counted) outside of the expert's bracket to its census. The sums of a strip are kept by
// exponent in four tables, since neighbours often have the same one.
inline void take_census(const float* used, const Expert& e, int n) {
    const uint32_t lowest = bit_cast<uint32_t>(e.threshold), end = lowest + (e.span ? e.span : 1);
    int64_t n_above = 0;
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(used[i]);
        if (bits - lowest < e.span) continue;
        const uint32_t exponent = bits >> 23, above = bits >= end ? 1 : 0;
        e.census[above * kExponents + exponent] += (bits & 0x7fffffu) + (exponent > 0 ? 1u << 23 : 0u);
        n_above += above;
    }
    e.census[2 * kExponents] += n_above;
}

}  // namespace OTA_ISA
}  // namespace ota
