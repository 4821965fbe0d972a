// Vectors of float32 for streamed.hpp, whose loop over experts inside of the loop over elements the compiler does
// not vectorise. OTA_LANES: how many numbers; not defined where there is no such instruction set.
#pragma once

#include "formulas.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define OTA_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define OTA_LANES 8
#endif

#if defined(OTA_LANES)

#include <immintrin.h>

namespace ota {
namespace OTA_ISA {
namespace lanes {

#if OTA_LANES == 16

using Floats = __m512;
using Bits = __m512i;
using Mask = __mmask16;

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Bits all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Bits bits(Floats x) { return _mm512_castps_si512(x); }
inline Floats floats(Bits x) { return _mm512_castsi512_ps(x); }

inline Bits widen(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bits widen(const uint16_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_f16(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Bits load(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint32_t* p, Bits x) { _mm512_storeu_si512(p, x); }
// first, first + 1, ...
inline Bits from(int first) {
    return _mm512_add_epi32(_mm512_set1_epi32(first),
                            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
}
inline void store_low_halves(uint16_t* p, Bits x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
inline Bits f16_of(Floats x) { return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_f16(uint16_t* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats sqrt(Floats x) { return _mm512_sqrt_ps(x); }

inline Bits add(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
inline Bits sub(Bits a, Bits b) { return _mm512_sub_epi32(a, b); }
inline Bits add_where(Mask m, Bits a, Bits b) { return _mm512_mask_add_epi32(a, m, a, b); }
inline Bits both(Bits a, Bits b) { return _mm512_and_si512(a, b); }
inline Bits either(Bits a, Bits b) { return _mm512_or_si512(a, b); }
inline Bits larger(Bits a, Bits b) { return _mm512_max_epu32(a, b); }
template <int N> inline Bits left(Bits x) { return _mm512_slli_epi32(x, N); }
template <int N> inline Bits right(Bits x) { return _mm512_srli_epi32(x, N); }
// table[i & 3] of each i.
inline Bits look_up(Bits i, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return _mm512_permutexvar_epi32(
        i, _mm512_set4_epi32(static_cast<int>(d), static_cast<int>(c), static_cast<int>(b), static_cast<int>(a)));
}
inline uint32_t largest(Bits x) { return _mm512_reduce_max_epu32(x); }

inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask is_zero(Floats x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ); }
inline Mask is_zero(Bits x) { return _mm512_testn_epi32_mask(x, x); }
inline Mask equal(Bits a, Bits b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Mask above(Bits a, Bits b) { return _mm512_cmpgt_epu32_mask(a, b); }
// Lanes of m where a is not at least b (which may be NaN).
inline Mask not_at_least(Mask m, Floats a, Floats b) { return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_NGE_UQ); }
inline Mask either(Mask a, Mask b) { return static_cast<Mask>(a | b); }
inline Mask both(Mask a, Mask b) { return static_cast<Mask>(a & b); }
inline Mask without(Mask a, Mask b) { return static_cast<Mask>(a & ~b); }
inline Floats zero_unless(Mask m, Floats x) { return _mm512_maskz_mov_ps(m, x); }
inline Floats zero_where(Mask m, Floats x) { return _mm512_mask_blend_ps(m, x, _mm512_setzero_ps()); }
inline Floats choose(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }
inline Mask nowhere() { return 0; }
inline Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }
inline Bits ones_where(Mask m) { return _mm512_maskz_set1_epi32(m, 1); }
inline uint32_t lanes_of(Mask m) { return m; }

// Writes the lanes of the mask one after the other, to where there is room for all lanes.
inline void write(Mask m, Bits x, uint32_t* out) { _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, x)); }
inline void write_low_halves(Mask m, Bits x, uint16_t* out) {
    store_low_halves(out, _mm512_maskz_compress_epi32(m, x));
}

constexpr int kVectors = 4;  // whose sums leave enough of 32 registers free

#else

using Floats = __m256;
using Bits = __m256i;
using Mask = __m256;

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Bits all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Bits bits(Floats x) { return _mm256_castps_si256(x); }
inline Floats floats(Bits x) { return _mm256_castsi256_ps(x); }

inline Bits widen(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Bits widen(const uint16_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load_f16(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bits load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store(uint32_t* p, Bits x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline Bits from(int first) {
    return _mm256_add_epi32(_mm256_set1_epi32(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline void store_low_halves(uint16_t* p, Bits x) {
    const __m256i packed = _mm256_packus_epi32(x, x);
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
}
inline Bits f16_of(Floats x) { return _mm256_cvtepu16_epi32(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); }
inline void store_f16(uint16_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats sqrt(Floats x) { return _mm256_sqrt_ps(x); }

inline Bits add(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
inline Bits sub(Bits a, Bits b) { return _mm256_sub_epi32(a, b); }
inline Bits add_where(Mask m, Bits a, Bits b) { return add(a, _mm256_and_si256(bits(m), b)); }
inline Bits both(Bits a, Bits b) { return _mm256_and_si256(a, b); }
inline Bits either(Bits a, Bits b) { return _mm256_or_si256(a, b); }
inline Bits larger(Bits a, Bits b) { return _mm256_max_epu32(a, b); }
template <int N> inline Bits left(Bits x) { return _mm256_slli_epi32(x, N); }
template <int N> inline Bits right(Bits x) { return _mm256_srli_epi32(x, N); }
inline Bits look_up(Bits i, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const int w = static_cast<int>(a), x = static_cast<int>(b), y = static_cast<int>(c), z = static_cast<int>(d);
    return _mm256_permutevar8x32_epi32(_mm256_setr_epi32(w, x, y, z, w, x, y, z), i);
}
inline uint32_t largest(Bits x) {
    uint32_t each[8], top = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(each), x);
    for (uint32_t one : each) top = OTA_ISA::larger(top, one);
    return top;
}

inline Mask at_least(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask is_zero(Floats x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ); }
inline Mask equal(Bits a, Bits b) { return floats(_mm256_cmpeq_epi32(a, b)); }
inline Mask is_zero(Bits x) { return equal(x, _mm256_setzero_si256()); }
inline Mask above(Bits a, Bits b) {  // comparisons are signed
    const Bits half = all(0x80000000u);
    return floats(_mm256_cmpgt_epi32(_mm256_xor_si256(a, half), _mm256_xor_si256(b, half)));
}
inline Mask not_at_least(Mask m, Floats a, Floats b) { return _mm256_andnot_ps(at_least(a, b), m); }
inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Mask without(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
inline Floats zero_unless(Mask m, Floats x) { return _mm256_and_ps(m, x); }
inline Floats zero_where(Mask m, Floats x) { return _mm256_andnot_ps(m, x); }
inline Floats choose(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m); }
inline Mask nowhere() { return _mm256_setzero_ps(); }
inline Mask first_lanes(int n) {
    return floats(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
inline Bits ones_where(Mask m) { return right<31>(bits(m)); }
inline uint32_t lanes_of(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }

template <typename T> inline void write_each(Mask m, Bits x, T* out) {
    uint32_t each[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(each), x);
    for (uint32_t rest = lanes_of(m); rest != 0; rest &= rest - 1)
        *out++ = static_cast<T>(each[__builtin_ctz(rest)]);
}
inline void write(Mask m, Bits x, uint32_t* out) { write_each(m, x, out); }
inline void write_low_halves(Mask m, Bits x, uint16_t* out) { write_each(m, x, out); }

constexpr int kVectors = 2;  // of 16 registers

#endif

inline int count(Mask m) { return __builtin_popcount(lanes_of(m)); }
template <int V> inline int count(const Mask (&m)[V]) {
    uint64_t joined = 0;
    for (int v = 0; v < V; ++v) joined |= uint64_t{lanes_of(m[v])} << (v * OTA_LANES);
    return __builtin_popcountll(joined);
}

// As to_bf16, of numbers.
inline Bits bf16_of(Floats x) {
    const Bits even = both(right<16>(bits(x)), all(1u));
    return right<16>(add(bits(x), add(even, all(0x7fffu))));
}
inline void store_bf16(uint16_t* p, Floats x) { store_low_halves(p, bf16_of(x)); }

}  // namespace lanes
}  // namespace OTA_ISA
}  // namespace ota

#endif
