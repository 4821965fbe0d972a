// Vectors of float32 and of 32 bits, 16 with AVX-512 and 8 with AVX2; OTA_LANES says how many, where there are any. With
// intrinsics, because the compiler does not vectorise a loop over experts inside of the loop over elements. Operations
// are those of stages.hpp, bit for bit.
#pragma once

#include "formats.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__)
#define OTA_LANES 16
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define OTA_LANES 8
#endif

#if defined(OTA_LANES)

namespace ota {
namespace OTA_ISA {
namespace lanes {

#if OTA_LANES == 16

using Floats = __m512;
using Bits = __m512i;
using Mask = __mmask16;
constexpr int kVectors = 4;  // whose sums leave enough of 32 registers free

inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Bits all(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Bits bits(Floats x) { return _mm512_castps_si512(x); }
inline Floats floats(Bits x) { return _mm512_castsi512_ps(x); }
inline Bits widen(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline __m256i halves(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Bits widen(const uint16_t* p) { return _mm512_cvtepu16_epi32(halves(p)); }
inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline Floats load_f16(const uint16_t* p) { return _mm512_cvtph_ps(halves(p)); }
inline void store_low_halves(uint16_t* p, Bits x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x); }
inline void store(uint32_t* p, Bits x) { _mm512_storeu_si512(p, x); }
inline void store_f16(uint16_t* p, Floats x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats sqrt(Floats x) { return _mm512_sqrt_ps(x); }
// a < b ? a : b and a > b ? a : b: where one is NaN, b.
inline Floats smaller(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Bits add(Bits a, Bits b) { return _mm512_add_epi32(a, b); }
inline Bits sub(Bits a, Bits b) { return _mm512_sub_epi32(a, b); }
inline Bits both(Bits a, Bits b) { return _mm512_and_si512(a, b); }
inline Bits larger(Bits a, Bits b) { return _mm512_max_epu32(a, b); }
template <int N> inline Bits left(Bits x) { return _mm512_slli_epi32(x, N); }
template <int N> inline Bits right(Bits x) { return _mm512_srli_epi32(x, N); }
// table[i & 3] of each i.
inline Bits look_up(Bits i, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    return _mm512_permutexvar_epi32(
        i, _mm512_set4_epi32(static_cast<int>(d), static_cast<int>(c), static_cast<int>(b), static_cast<int>(a)));
}
inline Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline Mask nonzero(Floats x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_NEQ_UQ); }
inline Mask is_zero(Floats x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ); }
inline Mask is_zero(Bits x) { return _mm512_testn_epi32_mask(x, x); }
// Lanes of m where a is not at least b (which may be NaN).
inline Mask not_at_least(Mask m, Floats a, Floats b) { return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_NGE_UQ); }
// Not a | b: the compiler makes vectors of 16-bit numbers of several masks.
inline Mask either(Mask a, Mask b) { return _mm512_kor(a, b); }
inline Floats zero_unless(Mask m, Floats x) { return _mm512_maskz_mov_ps(m, x); }
inline Floats choose(Mask m, Floats a, Floats b) { return _mm512_mask_mov_ps(b, m, a); }
inline Mask nowhere() { return 0; }
inline Mask everywhere() { return 0xffff; }
inline uint32_t lanes_of(Mask m) { return m; }
inline Mask mask_of(uint32_t lanes) { return static_cast<Mask>(lanes); }
inline Mask both(Mask a, Mask b) { return _mm512_kand(a, b); }
inline Mask without(Mask a, Mask b) { return _mm512_kandn(b, a); }
inline Mask above(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Mask equal(Bits a, Bits b) { return _mm512_cmpeq_epi32_mask(a, b); }
inline Mask at_most(Bits a, Bits b) { return _mm512_cmple_epu32_mask(a, b); }
// Lanes of m where a > b.
inline Mask above(Mask m, Floats a, Floats b) { return _mm512_mask_cmp_ps_mask(m, a, b, _CMP_GT_OQ); }
inline Floats flip(Floats x, Bits by) { return floats(_mm512_xor_si512(bits(x), by)); }
inline Bits count(Bits n, Mask m) { return _mm512_mask_sub_epi32(n, m, n, _mm512_set1_epi32(-1)); }
// a + b, and a b + c, in lanes of m; a, and c, elsewhere.
inline Floats add_where(Mask m, Floats a, Floats b) { return _mm512_mask_add_ps(a, m, a, b); }
inline Floats fma_where(Mask m, Floats a, Floats b, Floats c) { return _mm512_mask3_fmadd_ps(a, b, c, m); }
// Of 64-bit lanes: the low halves multiplied; the high halves; numbers from `first` on.
inline Bits product(Bits a, Bits b) { return _mm512_mul_epu32(a, b); }
inline Bits high_half(Bits x) { return _mm512_srli_epi64(x, 32); }
inline Bits count_from(uint64_t first) {
    return _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Bits differ(Bits a, Bits b, Bits c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
// The low halves of a, b, c, d of each 64-bit lane, in turn.
inline void in_turn(Bits a, Bits b, Bits c, Bits d, Bits* out) {
    constexpr auto kEvenToOdd = static_cast<_MM_PERM_ENUM>(0x80);
    const Bits ab = _mm512_mask_shuffle_epi32(a, 0xaaaa, b, kEvenToOdd);
    const Bits cd = _mm512_mask_shuffle_epi32(c, 0xaaaa, d, kEvenToOdd);
    out[0] = _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), cd);
    out[1] = _mm512_permutex2var_epi64(ab, _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15), cd);
}

#else

using Floats = __m256;
using Bits = __m256i;
using Mask = __m256;
constexpr int kVectors = 2;  // of 16 registers

inline Floats all(float x) { return _mm256_set1_ps(x); }
inline Bits all(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Bits bits(Floats x) { return _mm256_castps_si256(x); }
inline Floats floats(Bits x) { return _mm256_castsi256_ps(x); }
inline Bits widen(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
inline __m128i halves(const uint16_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline Bits widen(const uint16_t* p) { return _mm256_cvtepu16_epi32(halves(p)); }
inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline Floats load_f16(const uint16_t* p) { return _mm256_cvtph_ps(halves(p)); }
inline void store_low_halves(uint16_t* p, Bits x) {
    const __m256i joined = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), 0x08);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x); }
inline void store(uint32_t* p, Bits x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x); }
inline void store_f16(uint16_t* p, Floats x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats sqrt(Floats x) { return _mm256_sqrt_ps(x); }
inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Bits add(Bits a, Bits b) { return _mm256_add_epi32(a, b); }
inline Bits sub(Bits a, Bits b) { return _mm256_sub_epi32(a, b); }
inline Bits both(Bits a, Bits b) { return _mm256_and_si256(a, b); }
inline Bits larger(Bits a, Bits b) { return _mm256_max_epu32(a, b); }
template <int N> inline Bits left(Bits x) { return _mm256_slli_epi32(x, N); }
template <int N> inline Bits right(Bits x) { return _mm256_srli_epi32(x, N); }
inline Bits look_up(Bits i, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
    const int w = static_cast<int>(a), x = static_cast<int>(b), y = static_cast<int>(c), z = static_cast<int>(d);
    return _mm256_permutevar8x32_epi32(_mm256_setr_epi32(w, x, y, z, w, x, y, z), i);
}
inline Mask at_least(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
inline Mask nonzero(Floats x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_UQ); }
inline Mask is_zero(Floats x) { return _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_EQ_OQ); }
inline Mask is_zero(Bits x) { return floats(_mm256_cmpeq_epi32(x, _mm256_setzero_si256())); }
inline Mask not_at_least(Mask m, Floats a, Floats b) { return _mm256_andnot_ps(at_least(a, b), m); }
inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
inline Floats zero_unless(Mask m, Floats x) { return _mm256_and_ps(m, x); }
inline Floats choose(Mask m, Floats a, Floats b) { return _mm256_blendv_ps(b, a, m); }
inline Mask nowhere() { return _mm256_setzero_ps(); }
inline Mask everywhere() { return floats(_mm256_set1_epi32(-1)); }
inline uint32_t lanes_of(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
inline Mask mask_of(uint32_t lanes) {
    const Bits each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return floats(_mm256_cmpeq_epi32(both(all(lanes), each), each));
}
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Mask without(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
inline Mask above(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Mask equal(Bits a, Bits b) { return floats(_mm256_cmpeq_epi32(a, b)); }
inline Mask at_most(Bits a, Bits b) { return equal(_mm256_min_epu32(a, b), a); }
inline Mask above(Mask m, Floats a, Floats b) { return both(m, above(a, b)); }
inline Floats flip(Floats x, Bits by) { return floats(_mm256_xor_si256(bits(x), by)); }
inline Bits count(Bits n, Mask m) { return _mm256_sub_epi32(n, bits(m)); }
inline Floats add_where(Mask m, Floats a, Floats b) { return choose(m, add(a, b), a); }
inline Floats fma_where(Mask m, Floats a, Floats b, Floats c) { return choose(m, fma(a, b, c), c); }
inline Bits product(Bits a, Bits b) { return _mm256_mul_epu32(a, b); }
inline Bits high_half(Bits x) { return _mm256_srli_epi64(x, 32); }
inline Bits count_from(uint64_t first) {
    return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Bits differ(Bits a, Bits b, Bits c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void in_turn(Bits a, Bits b, Bits c, Bits d, Bits* out) {
    const Bits ab = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
    const Bits cd = _mm256_blend_epi32(c, _mm256_slli_epi64(d, 32), 0xaa);
    const Bits even = _mm256_unpacklo_epi64(ab, cd), odd = _mm256_unpackhi_epi64(ab, cd);
    out[0] = _mm256_permute2x128_si256(even, odd, 0x20), out[1] = _mm256_permute2x128_si256(even, odd, 0x31);
}

#endif

constexpr int kStep = kVectors * OTA_LANES;  // a strip is a whole number of steps
static_assert(kStrip % kStep == 0, "a strip is a whole number of steps");
constexpr int kAhead = 128;  // elements between what is read and what is fetched

inline uint64_t joined(const Mask (&m)[kVectors]) {
    uint64_t all = 0;
    for (int v = 0; v < kVectors; ++v) all |= uint64_t{lanes_of(m[v])} << (v * OTA_LANES);
    return all;
}

inline int64_t total(Bits x) {
    uint32_t each[OTA_LANES];
    int64_t sum = 0;
    std::memcpy(each, &x, sizeof(each));
    for (uint32_t one : each) sum += one;
    return sum;
}

inline uint32_t largest(Bits x) {
    uint32_t each[OTA_LANES], top = 0;
    std::memcpy(each, &x, sizeof(each));
    for (uint32_t one : each) top = OTA_ISA::larger(top, one);
    return top;
}

// As to_bf16, of numbers.
inline Bits bf16_of(Floats x) {
    const Bits even = both(right<16>(bits(x)), all(1u));
    return right<16>(add(bits(x), add(even, all(0x7fffu))));
}

inline Bits magnitude(Floats x) { return both(bits(x), all(0x7fffffffu)); }
inline Floats size(Floats x) { return floats(magnitude(x)); }

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
        return choose(is_zero(c), all(0.0f), floats(add(left<21>(c), of_quarter)));
    }
};

}  // namespace lanes
}  // namespace OTA_ISA
}  // namespace ota

#endif
