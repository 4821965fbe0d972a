// Elements of a tile that some expert's bracket leaves undecided, and the lists that hold them.
#pragma once

#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

// Elements of a tile whose indices leave the highest bit free.
constexpr int64_t kFlag = int64_t{1} << 31;

// Calls step(i) where flags (0 or 1, of which there are kSpare beyond n) are 1: few.
template <typename Step>
inline void each_one(const int32_t* flags, int n, Step step) {
    for (int i = 0; i < n; i += 16) {
        int32_t some = 0;
        for (int j = 0; j < 16; ++j) some |= flags[i + j];
        for (int j = 0; some && j < 16 && i + j < n; ++j)
            if (flags[i + j]) step(i + j);
    }
}

// Undecided elements that have yet to be resolved: while their inputs are in the second-level cache, and enough of
// them for whole vectors.
struct Waiting {
    static constexpr int kMany = 192;
    int count = 0;
    uint32_t at[kMany + kSpan];

    // Appends where flags of a strip are 1.
    void add(const int32_t* flags, int64_t offset, int n) {
        each_one(flags, n, [&](int i) { at[count++] = static_cast<uint32_t>(offset + i); });
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

// Whether the result as it is stored is a number: the exponents of those that are not are all ones.
template <typename Stored>
inline bool is_stored_finite(const uint8_t* out, int64_t at, Stored exponent) {
    Stored bits;
    std::memcpy(&bits, out + sizeof(bits) * static_cast<uint64_t>(at), sizeof(bits));
    return (bits & exponent) != exponent;
}

inline bool is_stored_finite(const MergeArgs& args, int64_t at) {
    switch (args.out_dtype) {
        case DType::bf16: return is_stored_finite<uint16_t>(args.out, at, 0x7f80u);
        case DType::f16: return is_stored_finite<uint16_t>(args.out, at, 0x7c00u);
        case DType::f32: return is_stored_finite<uint32_t>(args.out, at, 0x7f800000u);
        default: return is_stored_finite<uint64_t>(args.out, at, 0x7ff0000000000000u);
    }
}

template <typename T>
void move(uint8_t* column, int64_t from, int64_t to) {
    std::memcpy(column + sizeof(T) * static_cast<uint64_t>(to), column + sizeof(T) * static_cast<uint64_t>(from), sizeof(T));
}

// Moves candidate `from` to `to`.
inline void move(const Tile& tile, Candidates& c, int64_t from, int64_t to) {
    if (from == to) return;
    const auto copy = [&](const Operand& x, uint8_t* column) {
        if (x.data == nullptr) return;
        switch (item_size(x.dtype)) {
            case 8: return move<uint64_t>(column, from, to);
            case 4: return move<uint32_t>(column, from, to);
            case 2: return move<uint16_t>(column, from, to);
            default: return move<uint8_t>(column, from, to);
        }
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

inline bool has_censuses(const Tile& tile) {
    bool some = false;
    for (int t = 0; t < tile.n_experts; ++t) some |= tile.experts[t].census != nullptr;
    return some;
}

// Adds a score (as it is counted) outside of the expert's bracket to its census.
inline void count_score(uint32_t bits, const Expert& e, uint32_t end) {
    const uint32_t exponent = bits >> 23, above = bits >= end ? 1 : 0;
    e.census[above * kExponents + exponent] += (bits & 0x7fffffu) + (exponent > 0 ? 1u << 23 : 0u);
}

// Scores whose exponents lie from `first` (>= 1) on in a window of kWindow: at most 256 of them have a sum in float64
// that is exact, 24 + kWindow - 1 + 8 bits. The sum goes to the census in two parts, which cannot overflow it.
constexpr uint32_t kWindow = 21;
static_assert(kStrip <= 256, "24 + 20 + 8 bits");

// Adds such a sum to a census.
inline void add_sum(double sum, uint32_t first, int64_t* census) {
    const auto units = static_cast<int64_t>(sum * bit_cast<double>(uint64_t{1023 + 150 - first} << 52));
    census[first] += units & ((1 << 20) - 1);
    census[first + 20] += units >> 20;
}

// values: n of them, then 0 up to kStrip.
inline void add_window(const float* __restrict values, int n, uint32_t first, int64_t* census) {
    constexpr int kLanes = 16;
    alignas(64) double lanes[kLanes] = {};
    for (int i = 0; i < n; i += kLanes)
        for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += static_cast<double>(values[i + lane]);
    double sum = 0;
    for (double lane : lanes) sum += lane;
    add_sum(sum, first, census);
}

// The windows of an expert's census, as exponents and as bits of scores: [low_first, low_end) below its bracket, [end,
// high_last) above it.
struct Windows {
    uint32_t low, high, low_first, low_end, end, high_last;

    Windows() = default;
    explicit Windows(const Expert& e) {
        const uint32_t lowest = bit_cast<uint32_t>(e.threshold), top_below = lowest >> 23;
        end = lowest + (e.span ? e.span : 1);
        low_end = e.span ? lowest : end;
        low = top_below > kWindow ? top_below - (kWindow - 1) : 1;
        high = end >> 23 > 1 ? end >> 23 : 1;
        const bool narrow = high + kWindow < kExponents;
        low_first = narrow ? low << 23 : 0xffffffffu, high_last = narrow ? (high + kWindow) << 23 : 0;
        high = high < kExponents - 20 ? high : 1;
    }
};

// Scores of the windows to `below` and to `above`, 0 for all others. rest: 1 where one outside of the bracket is in
// neither; returns whether some is. Masks instead of conditions: else the compiler branches.
inline int32_t split(const float* __restrict used, const Windows& x, int n, float* __restrict below,
                     float* __restrict above, int32_t* __restrict rest) {
    const auto mask = [](bool is) { return -static_cast<uint32_t>(is); };
    const uint32_t low_first = x.low_first, low_end = x.low_end, end = x.end, high_last = x.high_last;
    uint32_t some = 0;
    for (int i = 0; i < n; ++i) {
        const uint32_t bits = bit_cast<uint32_t>(used[i]);
        const uint32_t is_below = mask(bits < low_end), is_above = mask(bits >= end);
        const uint32_t in_low = is_below & mask(bits >= low_first), in_high = is_above & mask(bits < high_last);
        below[i] = bit_cast<float>(bits & in_low);
        above[i] = bit_cast<float>(bits & in_high);
        const uint32_t left = ((is_below | is_above) ^ (in_low | in_high)) & mask(bits != 0) & 1u;
        rest[i] = static_cast<int32_t>(left);
        some |= left;
    }
    return static_cast<int32_t>(some);
}

// Adds scores outside of the expert's bracket to its census: most of them in float64, which vectorises.
inline void take_census(const float* __restrict used, const Expert& e, int n) {
    const Windows x(e);
    const uint32_t end = x.end;
    alignas(64) int32_t rest[kStrip + kSpare] = {};
    alignas(64) float below[kStrip] = {}, above[kStrip] = {};
    const int32_t some = split(used, x, n, below, above, rest);
    int32_t n_above = 0;
    for (int i = 0; i < n; ++i) n_above += bit_cast<uint32_t>(used[i]) >= end ? 1 : 0;
    add_window(below, n, x.low, e.census);
    add_window(above, n, x.high, e.census + kExponents);
    e.census[2 * kExponents] += n_above;
    if (some) each_one(rest, n, [&](int at) { count_score(bit_cast<uint32_t>(used[at]), e, end); });
}

}  // namespace OTA_ISA
}  // namespace ota
