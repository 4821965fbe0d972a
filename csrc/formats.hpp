// Element types and forms of curvature: how they are read into float32, and results written. Compiled once per
// instruction set inside namespace ota::OTA_ISA, so that no inline function of a wider instruction set can be linked
// into a narrower one. Contraction to FMA is off (CMakeLists.txt): masks must come out the same everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "kernels.hpp"

namespace ota {
namespace OTA_ISA {

// Elements that are merged at once: their planes (base, sums, masks) stay in the first-level cache.
constexpr int kStrip = 256;

// Elements between two fetches ahead: a whole number of cache lines of any type.
constexpr int kChunk = 64;
static_assert(kStrip % kChunk == 0, "a strip is a whole number of chunks");

template <typename To, typename From>
inline To bit_cast(From value) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
    To out;
    std::memcpy(&out, &value, sizeof(out));
    return out;
}

// Small floats to float32: E exponent bits of the given bias, M mantissa bits below them.
template <int M, int Bias>
inline uint32_t widen_small_float(uint32_t magnitude, uint32_t exponent_mask) {
    uint32_t bits = magnitude << (23 - M);
    const uint32_t exponent = bits & exponent_mask;
    bits += static_cast<uint32_t>(127 - Bias) << 23;
    const uint32_t one_up = bits + (1u << 23);
    const float subnormal = bit_cast<float>(one_up) - bit_cast<float>(static_cast<uint32_t>(128 - Bias) << 23);
    return exponent == 0 ? bit_cast<uint32_t>(subnormal) : bits;
}

inline float from_bf16(uint16_t v) { return bit_cast<float>(static_cast<uint32_t>(v) << 16); }

struct bf16 {
    uint16_t bits;
    operator float() const { return from_bf16(bits); }
};

inline float from_f16(uint16_t v) {
    const uint32_t magnitude = v & 0x7fffu;
    uint32_t bits = widen_small_float<10, 15>(magnitude, 0x0f800000u);
    bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
    return bit_cast<float>(bits | (static_cast<uint32_t>(v & 0x8000u) << 16));
}

inline float from_e4m3(uint8_t v) {
    const uint32_t magnitude = v & 0x7fu;
    uint32_t bits = widen_small_float<3, 7>(magnitude, 0x07800000u);
    bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
    return bit_cast<float>(bits | (static_cast<uint32_t>(v & 0x80u) << 24));
}

inline float from_e5m2(uint8_t v) { return from_f16(static_cast<uint16_t>(v << 8)); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline uint16_t to_bf16(float v) {
    const uint32_t bits = bit_cast<uint32_t>(v);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}

inline uint16_t to_f16(float v) {
    const uint32_t bits = bit_cast<uint32_t>(v);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const float shifted = bit_cast<float>(magnitude) + 0.5f;  // lines the subnormal up at bit 0
    const uint32_t subnormal = bit_cast<uint32_t>(shifted) - 0x3f000000u;
    uint32_t out = magnitude < (113u << 23) ? subnormal : normal;
    out = magnitude >= 0x477ff000u ? 0x7c00u : out;  // 65520 and above
    out = magnitude > 0x7f800000u ? 0x7e00u : out;
    return static_cast<uint16_t>(out | sign);
}

// n elements of type T at `src`, in place where the address allows it (a file may put a tensor anywhere), else
// copied to `room`: vectorised loops want aligned element types.
template <typename T>
inline const T* elements(const uint8_t* src, int n, T* room) {
    if (reinterpret_cast<uintptr_t>(src) % alignof(T) == 0) return reinterpret_cast<const T*>(src);
    std::memcpy(room, src, sizeof(T) * static_cast<size_t>(n));
    return room;
}

// The strip after the one at `offset`, to be fetched chunk by chunk between computations. A tile is a dozen streams,
// each read for one strip at a time, too short for the hardware's own prefetcher; a whole strip asked for at once
// fills the queue of outstanding lines and takes twice the time.
class Ahead {
public:
    Ahead() = default;
    Ahead(const Operand& x, int64_t offset, int64_t total) : Ahead(x.data, item_size(x.dtype), offset, total) {}
    Ahead(const Curvature& c, int64_t offset, int64_t total) {
        if (c.kind == CurvatureKind::full) *this = Ahead(c.values, offset, total);
        if (c.kind == CurvatureKind::log8) *this = Ahead(c.codes, 1, offset, total);
    }
    void fetch(int chunk) const {
        const int end = (chunk + kChunk) * size_;
        for (int byte = chunk * size_; byte < end; byte += 64) __builtin_prefetch(next_ + byte, 0, 3);
    }

private:
    Ahead(const uint8_t* data, int size, int64_t offset, int64_t total) {
        if (data == nullptr || offset + 2 * kStrip > total) return;
        size_ = size;
        next_ = data + (offset + kStrip) * size;
    }

    const uint8_t* next_ = nullptr;
    int size_ = 0;  // bytes of an element
};

inline void decode_f16(const uint16_t* src, int n, float* dst) {
    int i = 0;
#if defined(__F16C__) || defined(__AVX512F__)
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i))));
#endif
    for (; i < n; ++i) dst[i] = from_f16(src[i]);
}

// Elements [offset, offset + n) as float32: in place where they are float32 already, else through `room`
// (kStrip elements).
inline const float* load(const Operand& x, int64_t offset, int n, float* room) {
    alignas(64) uint16_t halves[kStrip];
    alignas(64) double doubles[kStrip];
    switch (x.dtype) {
        case DType::f32:
            return elements(x.data + 4 * offset, n, room);
        case DType::bf16: {
            const uint16_t* src = elements(x.data + 2 * offset, n, halves);
            for (int i = 0; i < n; ++i) room[i] = from_bf16(src[i]);
            break;
        }
        case DType::f16:
            decode_f16(elements(x.data + 2 * offset, n, halves), n, room);
            break;
        case DType::f64: {
            const double* src = elements(x.data + 8 * offset, n, doubles);
            for (int i = 0; i < n; ++i) room[i] = static_cast<float>(src[i]);
            break;
        }
        case DType::f8_e4m3:
            for (int i = 0; i < n; ++i) room[i] = from_e4m3(x.data[offset + i]);
            break;
        case DType::f8_e5m2:
            for (int i = 0; i < n; ++i) room[i] = from_e5m2(x.data[offset + i]);
            break;
    }
    return room;
}

// The same in the type W: bf16 (all of them stored so), float, or double (where a sum in float64 has a use for it).
template <typename W>
inline const W* view(const Operand& x, int64_t offset, int n, W* room) {
    if constexpr (std::is_same<W, float>::value) return load(x, offset, n, room);
    else if constexpr (std::is_same<W, bf16>::value) return elements(x.data + 2 * offset, n, room);
    else {
        if (x.dtype == DType::f64) return elements(x.data + 8 * offset, n, room);
        alignas(64) float floats[kStrip];
        const float* values = load(x, offset, n, floats);
        for (int i = 0; i < n; ++i) room[i] = values[i];
        return room;
    }
}

// What a log8 code stands for, before it is scaled: see ota_kernels/tensors/log8.py.
inline float level(uint8_t code) {
    const uint32_t c = code, m = c & 3u;
    const uint32_t bits = ((32u * c - (m * (45u - 11u * m) >> 2)) << 16) + (64u << 23);
    return bit_cast<float>(c == 0 ? 0u : bits);
}

// Curvature of elements [offset, offset + n) of the tile.
inline const float* load(const Curvature& c, int64_t offset, int n, float* room) {
    if (c.kind == CurvatureKind::full) return load(c.values, offset, n, room);
    if (c.kind == CurvatureKind::uniform) {
        for (int i = 0; i < n; ++i) room[i] = 1.0f;
        return room;
    }
    int64_t row = (c.start + offset) / c.n_columns, column = (c.start + offset) % c.n_columns;
    for (int done = 0; done < n; ++row, column = 0) {
        const int64_t left = c.n_columns - column;
        const int run = left < n - done ? static_cast<int>(left) : n - done;
        float* h = room + done;
        if (c.kind == CurvatureKind::log8) {
            const uint8_t* codes = c.codes + offset + done;
            const float scale = c.rows[row];
            for (int i = 0; i < run; ++i) h[i] = level(codes[i]) * scale;
        } else if (c.kind == CurvatureKind::rank1) {
            const float scale = c.rows[row];
            for (int i = 0; i < run; ++i) h[i] = scale * c.columns[column + i];
        } else {
            for (int i = 0; i < run; ++i) h[i] = 0.0f;
            for (int64_t r = 0; r < c.rank; ++r) {
                const float scale = c.rows[row * c.rank + r];
                const float* right = c.columns + r * c.n_columns + column;
                for (int i = 0; i < run; ++i) h[i] += scale * right[i];
            }
            for (int i = 0; i < run; ++i) h[i] = h[i] > 0.0f ? h[i] : 0.0f;
        }
        done += run;
    }
    return room;
}

// Writes elements [offset, offset + n) of `out`, which is aligned to its element size. Returns how many
// values are beyond `limit` or NaN.
template <typename T, typename Acc, typename Round>
inline int64_t store(uint8_t* out, int64_t offset, int n, const Acc* __restrict values, Acc limit,
                     Round round) {
    T* __restrict dst = reinterpret_cast<T*>(out) + offset;
    int32_t beyond = 0;
    for (int i = 0; i < n; ++i) {
        beyond += std::fabs(values[i]) <= limit ? 0 : 1;
        dst[i] = round(values[i]);
    }
    return beyond;
}

// The largest number that does not round to infinity. The next float32 is 65520 for float16.
inline double largest_finite(DType dtype) {
    switch (dtype) {
        case DType::bf16: return bit_cast<float>(0x7f7f7fffu);
        case DType::f16: return bit_cast<float>(0x477fefffu);
        case DType::f32: return 3.4028235677973362e38;
        default: return 1.7976931348623157e308;
    }
}

inline int64_t store(DType dtype, uint8_t* out, int64_t offset, int n, const float* values) {
    const float limit = static_cast<float>(largest_finite(dtype));
    if (dtype == DType::bf16)
        return store<uint16_t>(out, offset, n, values, limit, [](float v) { return to_bf16(v); });
    return store<uint16_t>(out, offset, n, values, limit, [](float v) { return to_f16(v); });
}

inline int64_t store(DType dtype, uint8_t* out, int64_t offset, int n, const double* values) {
    const double limit = largest_finite(dtype);
    if (dtype == DType::f64) return store<double>(out, offset, n, values, limit, [](double v) { return v; });
    return store<float>(out, offset, n, values, limit, [](double v) { return static_cast<float>(v); });
}

inline bool is_finite(float v) { return (bit_cast<uint32_t>(v) & 0x7fffffffu) < 0x7f800000u; }
inline bool is_curvature(float v) { return v >= 0.0f && is_finite(v); }

// At least kSuspect where v is not finite, or where h is negative or not finite (-0.0 too: the caller looks
// again). One integer maximum over these is the whole check of a clean block.
constexpr uint32_t kSuspect = 0x7f800000u;
inline uint32_t suspicion(float v) { return bit_cast<uint32_t>(v) & 0x7fffffffu; }
inline uint32_t suspicion_of_curvature(float h) { return bit_cast<uint32_t>(h); }
inline uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

inline bool any_nonfinite(const float* v, int n) {
    uint32_t top = 0;
    for (int i = 0; i < n; ++i) top = larger(top, suspicion(v[i]));
    return top >= kSuspect;
}

inline bool any_bad_curvature(const float* h, int n) {
    uint32_t top = 0;
    for (int i = 0; i < n; ++i) top = larger(top, suspicion_of_curvature(h[i]));
    return top >= kSuspect;
}

}  // namespace OTA_ISA
}  // namespace ota
