// Vectors of float64, as many as there are of float32: sums of results that are wider than 16 bits.
#pragma once

#include "lanes.hpp"

#if defined(OTA_LANES)

namespace ota {
namespace OTA_ISA {
namespace lanes {

#if OTA_LANES == 16

using Half = __m512d;
using HalfMask = __mmask8;

inline HalfMask low_mask(Mask m) { return static_cast<HalfMask>(m); }
inline HalfMask high_mask(Mask m) { return static_cast<HalfMask>(m >> 8); }
inline Mask joined(HalfMask low, HalfMask high) { return static_cast<Mask>(low | high << 8); }
inline Half half(double x) { return _mm512_set1_pd(x); }
inline Half low_half(Floats x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline Half high_half(Floats x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }
inline Floats narrow(Half low, Half high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}
inline Half load(const double* p) { return _mm512_loadu_pd(p); }
inline Half add(Half a, Half b) { return _mm512_add_pd(a, b); }
inline Half sub(Half a, Half b) { return _mm512_sub_pd(a, b); }
inline Half mul(Half a, Half b) { return _mm512_mul_pd(a, b); }
inline Half div(Half a, Half b) { return _mm512_div_pd(a, b); }
inline Half fma(Half a, Half b, Half c) { return _mm512_fmadd_pd(a, b, c); }
inline Half sqrt(Half x) { return _mm512_sqrt_pd(x); }
inline Half smaller(Half a, Half b) { return _mm512_min_pd(a, b); }
inline Half larger(Half a, Half b) { return _mm512_max_pd(a, b); }
inline Half size(Half x) { return _mm512_abs_pd(x); }
inline HalfMask nonzero(Half x) { return _mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_NEQ_UQ); }
inline HalfMask is_zero(Half x) { return _mm512_cmp_pd_mask(x, _mm512_setzero_pd(), _CMP_EQ_OQ); }
inline Half choose(HalfMask m, Half a, Half b) { return _mm512_mask_mov_pd(b, m, a); }

#else

using Half = __m256d;
using HalfMask = __m256d;

inline HalfMask low_mask(Mask m) {
    return _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_castsi256_si128(bits(m))));
}
inline HalfMask high_mask(Mask m) {
    return _mm256_castsi256_pd(_mm256_cvtepi32_epi64(_mm256_extracti128_si256(bits(m), 1)));
}
inline Half half(double x) { return _mm256_set1_pd(x); }
inline Half low_half(Floats x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline Half high_half(Floats x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }
inline Floats narrow(Half low, Half high) { return _mm256_set_m128(_mm256_cvtpd_ps(high), _mm256_cvtpd_ps(low)); }
// All ones or none of 64-bit lanes: their low halves.
inline Mask joined(HalfMask low, HalfMask high) {
    const __m256 mixed = _mm256_shuffle_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high), 0x88);
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
}
inline Half load(const double* p) { return _mm256_loadu_pd(p); }
inline Half add(Half a, Half b) { return _mm256_add_pd(a, b); }
inline Half sub(Half a, Half b) { return _mm256_sub_pd(a, b); }
inline Half mul(Half a, Half b) { return _mm256_mul_pd(a, b); }
inline Half div(Half a, Half b) { return _mm256_div_pd(a, b); }
inline Half fma(Half a, Half b, Half c) { return _mm256_fmadd_pd(a, b, c); }
inline Half sqrt(Half x) { return _mm256_sqrt_pd(x); }
inline Half smaller(Half a, Half b) { return _mm256_min_pd(a, b); }
inline Half larger(Half a, Half b) { return _mm256_max_pd(a, b); }
inline Half size(Half x) { return _mm256_andnot_pd(_mm256_set1_pd(-0.0), x); }
inline HalfMask nonzero(Half x) { return _mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_NEQ_UQ); }
inline HalfMask is_zero(Half x) { return _mm256_cmp_pd(x, _mm256_setzero_pd(), _CMP_EQ_OQ); }
inline Half choose(HalfMask m, Half a, Half b) { return _mm256_blendv_pd(b, a, m); }

#endif

struct Doubles {
    Half low, high;
};


inline Doubles add(Doubles a, Doubles b) { return {add(a.low, b.low), add(a.high, b.high)}; }
inline Doubles sub(Doubles a, Doubles b) { return {sub(a.low, b.low), sub(a.high, b.high)}; }
inline Doubles mul(Doubles a, Doubles b) { return {mul(a.low, b.low), mul(a.high, b.high)}; }
inline Doubles div(Doubles a, Doubles b) { return {div(a.low, b.low), div(a.high, b.high)}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)}; }
inline Doubles sqrt(Doubles x) { return {sqrt(x.low), sqrt(x.high)}; }
inline Doubles smaller(Doubles a, Doubles b) { return {smaller(a.low, b.low), smaller(a.high, b.high)}; }
inline Doubles larger(Doubles a, Doubles b) { return {larger(a.low, b.low), larger(a.high, b.high)}; }
inline Doubles size(Doubles x) { return {size(x.low), size(x.high)}; }
inline Mask nonzero(Doubles x) { return joined(nonzero(x.low), nonzero(x.high)); }
inline Mask is_zero(Doubles x) { return joined(is_zero(x.low), is_zero(x.high)); }
inline Doubles choose(Mask m, Doubles a, Doubles b) {
    return {choose(low_mask(m), a.low, b.low), choose(high_mask(m), a.high, b.high)};
}
inline Doubles zero_unless(Mask m, Doubles x) { return choose(m, x, {half(0), half(0)}); }
inline Doubles add_where(Mask m, Doubles a, Doubles b) { return choose(m, add(a, b), a); }
inline Doubles fma_where(Mask m, Doubles a, Doubles b, Doubles c) { return choose(m, fma(a, b, c), c); }

// Eight sums: element i of a plane is added to number i mod 8.
struct Eight {
#if OTA_LANES == 16
    Half sums = half(0);
    void add(Doubles x) { sums = lanes::add(lanes::add(sums, x.low), x.high); }
    void load(const double* from) { sums = lanes::load(from); }
    void store(double* to) const { _mm512_storeu_pd(to, sums); }
#else
    Doubles sums = {half(0), half(0)};
    void add(Doubles x) { sums = lanes::add(sums, x); }
    void load(const double* from) { sums = {lanes::load(from), lanes::load(from + 4)}; }
    void store(double* to) const { _mm256_storeu_pd(to, sums.low), _mm256_storeu_pd(to + 4, sums.high); }
#endif
};

// Sums in the type of an accumulator.
template <typename Acc>
struct In;

template <>
struct In<float> {
    using Sums = Floats;
    static Sums all(double x) { return lanes::all(static_cast<float>(x)); }
    static Sums of(Floats x) { return x; }
    static Sums load(const double* p) {
        return narrow(lanes::load(p), lanes::load(p + OTA_LANES / 2));
    }
    static Sums load(const float* p) { return lanes::load(p); }
    static Floats narrowed(Sums x) { return x; }
};

template <>
struct In<double> {
    using Sums = Doubles;
    static Sums all(double x) { return {half(x), half(x)}; }
    static Sums of(Floats x) { return {low_half(x), high_half(x)}; }
    static Sums load(const double* p) { return {lanes::load(p), lanes::load(p + OTA_LANES / 2)}; }
    static Floats narrowed(Sums x) { return narrow(x.low, x.high); }
};

}  // namespace lanes
}  // namespace OTA_ISA
}  // namespace ota

#endif
