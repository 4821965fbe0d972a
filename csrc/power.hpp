// h^p of float32 numbers for any p, in float64 inside and rounded once: within 0.51 units of the last place, the same
// bits on every machine, and vectorised; std::pow is neither.
#pragma once

#include <cmath>

#include "formats.hpp"

namespace ota {
namespace OTA_ISA {

// Chebyshev fits: log2(1 + x) / x for 1 + x from sqrt(1/2) to sqrt(2), and 2^x from -1/2 to 1/2; errors of 2^-34.
constexpr double kLog2[] = {
    0x1.71547652eda8fp+0, -0x1.7154767bd3083p-1, 0x1.ec709c0feeaa5p-2, -0x1.715435c382440p-2,
    0x1.27772e044d243p-2, -0x1.ec8d7be10f89bp-3, 0x1.a616e524812a8p-3, -0x1.6eb06b360baffp-3,
    0x1.4595037740cabp-3, -0x1.4172bf2795531p-3, 0x1.3d61a988db862p-3, -0x1.62611d8e2b687p-4};
constexpr double kExp2[] = {
    0x1.ffffffffa70c0p-1, 0x1.62e42fef84cd0p-1, 0x1.ebfbe0aa0c7ebp-3, 0x1.c6b08dd700d7fp-5,
    0x1.3b29d8b54c796p-7, 0x1.5d8745a361d4dp-10, 0x1.446c7dc4a4d0ap-13, 0x1.00dc4c8772621p-16};

// c[I] + c[I + 1] x + ...: a recursion, since a loop would keep the loop around it from being vectorised.
template <int I = 0, int N>
inline double polynomial(const double (&c)[N], double x) {
    if constexpr (I == N - 1)
        return c[I];
    else
        return std::fma(polynomial<I + 1>(c, x), x, c[I]);
}

// h at least 0 and finite; the rest gives numbers without meaning.
inline void power(const float* __restrict h, double p, int n, float* __restrict out) {
    constexpr double kRound = 6755399441055744.0;  // 1.5 2^52: the sum's low bits are the integer
    const float of_zero = p > 0 ? 0.0f : p < 0 ? HUGE_VALF : 1.0f;
    for (int i = 0; i < n; ++i) {
        const uint64_t bits = bit_cast<uint64_t>(static_cast<double>(h[i]));
        const uint64_t exponent = (bits - 0x3fe6a09e00000000u + (uint64_t{1024} << 52)) >> 52;  // and 1024
        const double x = bit_cast<double>(bits - (exponent << 52) + (uint64_t{1024} << 52)) - 1.0;
        const double whole = bit_cast<double>(exponent | 0x4330000000000000u) - (0x1p52 + 1024.0);
        double y = p * (whole + x * polynomial(kLog2, x));
        y = y < -1000.0 ? -1000.0 : y > 1000.0 ? 1000.0 : y;
        const double shifted = y + kRound, rest = y - (shifted - kRound);
        const uint64_t scale = (bit_cast<uint64_t>(shifted) + 1023) << 52;
        const float found = static_cast<float>(polynomial(kExp2, rest) * bit_cast<double>(scale));
        out[i] = h[i] == 0.0f ? of_zero : found;
    }
}

inline void power(const float* __restrict h, double p, int n, double* __restrict out) {
    for (int i = 0; i < n; ++i) out[i] = std::pow(static_cast<double>(h[i]), p);
}

}  // namespace OTA_ISA
}  // namespace ota
