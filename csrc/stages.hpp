// The words of ota_kernels/tensors/terms.py: score, select, elect, weigh, divide, one small function each, over planes
// of at most kStrip elements. Masks are 0 or -1. Float32 in the order of terms.py, so that decisions are the same
// bits everywhere; values in Acc: float32 for 16-bit outputs, float64 for wider ones.
#pragma once

#include "formats.hpp"
#include "power.hpp"

namespace ota {
namespace OTA_ISA {

// Edit.

template <typename W, typename Acc>
inline void difference32(const W* __restrict w, const Acc* __restrict origin, int n, float* __restrict d) {
    for (int i = 0; i < n; ++i) d[i] = static_cast<float>(w[i]) - static_cast<float>(origin[i]);
}

template <typename W, typename Acc>
inline void clipped(const W* __restrict w, const Acc* __restrict origin, double clip, int n, Acc* __restrict y) {
    const Acc most = static_cast<Acc>(clip), tiny = static_cast<Acc>(1e-6);
    for (int i = 0; i < n; ++i) {
        const Acc d = static_cast<Acc>(w[i]) - origin[i], size = std::fabs(d);
        const Acc share = most / (size < tiny ? tiny : size);
        y[i] = (share < Acc(0) ? Acc(0) : share > Acc(1) ? Acc(1) : share) * d;
    }
}

template <typename W, typename Acc>
inline void by_chance(const W* __restrict w, const Acc* __restrict origin, const float* __restrict p, int n,
                      Acc* __restrict y) {
    for (int i = 0; i < n; ++i) y[i] = (static_cast<Acc>(w[i]) - origin[i]) / static_cast<Acc>(p[i]);
}

// Score.

// s = (h k) (2^16 d)^2 with k = 2^32: float32 never underflows where the true saliency is above 1e-57, and powers of
// two keep the order exact.
inline float saliency(float h, float d, float k) {
    const float scaled = d * 65536.0f;
    return (h * k) * (scaled * scaled);
}

inline void saliencies(const float* __restrict h, const float* __restrict d, float k, int n, float* __restrict s) {
    for (int i = 0; i < n; ++i) s[i] = saliency(h[i], d[i], k);
}

// The edits too.
template <typename W, typename Acc>
inline void saliencies(const W* __restrict w, const Acc* __restrict origin, const float* __restrict h, float k, int n,
                       float* __restrict d, float* __restrict s) {
    for (int i = 0; i < n; ++i) {
        d[i] = static_cast<float>(w[i]) - static_cast<float>(origin[i]);
        s[i] = saliency(h[i], d[i], k);
    }
}

inline void curvatures(const float* __restrict h, float k, int n, float* __restrict s) {
    for (int i = 0; i < n; ++i) s[i] = h[i] * k;
}

inline void magnitudes(const float* __restrict d, int n, float* __restrict s) {
    for (int i = 0; i < n; ++i) s[i] = std::fabs(d[i]);
}

inline void row_magnitudes(const float* __restrict d, float of_row, int n, float* __restrict s) {
    for (int i = 0; i < n; ++i) s[i] = std::fabs(d[i] * 65536.0f) * of_row;
}

// One score of all experts' edits d[t].
inline void spread_of(const float (*d)[kStrip], int n_experts, int n, float* __restrict s) {
    alignas(64) float mean[kStrip];
    const float share = static_cast<float>(1.0 / n_experts);
    for (int i = 0; i < n; ++i) mean[i] = s[i] = 0.0f;
    for (int t = 1; t < n_experts; ++t)
        for (int i = 0; i < n; ++i) mean[i] += d[t][i] * 65536.0f - d[0][i] * 65536.0f;
    for (int i = 0; i < n; ++i) mean[i] *= share;
    for (int t = 0; t < n_experts; ++t)
        for (int i = 0; i < n; ++i) {
            const float apart = (d[t][i] * 65536.0f - d[0][i] * 65536.0f) - mean[i];
            s[i] += apart * apart;
        }
}

// Select.

inline void at_least(const float* __restrict s, float threshold, int n, int32_t* __restrict keep) {
    for (int i = 0; i < n; ++i) keep[i] = s[i] >= threshold ? -1 : 0;
}

inline void above(const float* __restrict s, float threshold, int n, int32_t* __restrict keep) {
    for (int i = 0; i < n; ++i) keep[i] = s[i] > threshold ? -1 : 0;
}

// Of those that equal the threshold, only where `tied`.
inline void at_least(const float* __restrict s, float threshold, const int32_t* __restrict tied, int n,
                     int32_t* __restrict keep) {
    for (int i = 0; i < n; ++i) keep[i] = (s[i] > threshold ? -1 : 0) | (s[i] == threshold ? tied[i] : 0);
}

inline void at_most(const float* __restrict s, float upper, const int32_t* __restrict tied, int n,
                    int32_t* __restrict keep) {
    for (int i = 0; i < n; ++i) keep[i] &= (s[i] < upper ? -1 : 0) | (s[i] == upper ? tied[i] : 0);
}

inline void below(const float* __restrict u, float probability, int n, int32_t* __restrict keep) {
    for (int i = 0; i < n; ++i) keep[i] = u[i] < probability ? -1 : 0;
}

inline void trim(const float* __restrict d, float least, int n, int32_t* __restrict keep) {
    for (int i = 0; i < n; ++i) keep[i] &= std::fabs(d[i]) >= least ? -1 : 0;
}

// How many are kept; `any`: by somebody.
inline int32_t count_kept(const int32_t* __restrict keep, int n, int32_t* __restrict any) {
    int32_t kept = 0;
    for (int i = 0; i < n; ++i) {
        kept -= keep[i];
        any[i] |= keep[i];
    }
    return kept;
}

// at_least, count_kept, and the largest suspicion of the scores.
inline int32_t keep_at_least(const float* __restrict s, float threshold, int n, int32_t* __restrict keep,
                             int32_t* __restrict any, uint32_t& top) {
    int32_t kept = 0;
    uint32_t largest = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t keeps = s[i] >= threshold ? -1 : 0;
        keep[i] = keeps;
        kept -= keeps;
        any[i] |= keeps;
        largest = larger(largest, suspicion_of_curvature(s[i]));
    }
    top = largest;
    return kept;
}

// Elect: over votes v = vote d32.

inline void sum_votes(const float* __restrict d, float vote, const int32_t* __restrict keep, int n,
                      float* __restrict elected) {
    for (int i = 0; i < n; ++i) elected[i] += keep[i] ? vote * d[i] : 0.0f;
}

inline void count_votes(const float* __restrict d, float vote, const int32_t* __restrict keep, int n,
                        float* __restrict elected) {
    for (int i = 0; i < n; ++i) {
        const float v = vote * d[i], sign = v > 0.0f ? 1.0f : v < 0.0f ? -1.0f : 0.0f;
        elected[i] += keep[i] ? sign : 0.0f;
    }
}

// tie: the sign of a sum of 0.
inline void same_sign(const float* __restrict elected, const float* __restrict d, float vote, float tie, int n,
                      int32_t* __restrict keep) {
    const int32_t up = tie > 0.0f ? -1 : 0, down = tie < 0.0f ? -1 : 0;
    for (int i = 0; i < n; ++i) {
        const float v = vote * d[i], e = elected[i];
        const int32_t zero = e == 0.0f ? -1 : 0;
        const int32_t plus = (e > 0.0f ? -1 : 0) | (zero & up), minus = (e < 0.0f ? -1 : 0) | (zero & down);
        keep[i] &= ((v > 0.0f ? -1 : 0) & plus) | ((v < 0.0f ? -1 : 0) & minus);
    }
}

// The last expert of the largest |v| so far.
inline void largest_vote(const float* __restrict d, float vote, const int32_t* __restrict keep, int t, int n,
                         float* __restrict largest, int32_t* __restrict winner) {
    for (int i = 0; i < n; ++i) {
        const float size = std::fabs(vote * d[i]);
        const bool wins = (keep[i] != 0) & (size >= largest[i]);
        largest[i] = wins ? size : largest[i];
        winner[i] = wins ? t : winner[i];
    }
}

inline void count_agreeing(const float* __restrict elected, const float* __restrict d, float vote, float share,
                           const int32_t* __restrict keep, int n, int32_t* __restrict agreeing) {
    for (int i = 0; i < n; ++i) {
        const float v = vote * d[i];
        agreeing[i] -= keep[i] & (std::fabs(v) > share * std::fabs(elected[i] - v) ? -1 : 0);
    }
}

// Weigh: P of each element, where one number of the expert is not enough.

template <typename Acc>
inline void powers(const float* __restrict h, const Numbers& x, double weight_scale, int n, Acc* __restrict p) {
    const Acc a = static_cast<Acc>(weight_scale), epsilon = static_cast<Acc>(x.epsilon);
    power(h, x.power, n, p);
    for (int i = 0; i < n; ++i) p[i] = std::fma(p[i], a, epsilon);
}

template <typename Acc>
inline void alone(const int32_t* __restrict adders, double weight_scale, double factor, int n, Acc* __restrict p) {
    const Acc a = static_cast<Acc>(weight_scale), of_one = a * static_cast<Acc>(factor);
    for (int i = 0; i < n; ++i) p[i] = adders[i] == 1 ? of_one : a;
}

// Divide: out = w_0 + lambda N / D into `numerator`, or w_0 where nobody keeps the element or D is 0. fallback: where
// that is so, 0 or -1. Returns how many nobody keeps. any: whether somebody does; none: that D says it.
template <typename Acc>
inline int32_t quotient(const Acc* __restrict base, const Acc* __restrict denominator, const int32_t* __restrict any,
                        Acc lambda, int n, Acc* __restrict numerator, int32_t* __restrict fallback) {
    int32_t nobody = 0;
    for (int i = 0; i < n; ++i) {
        const int32_t empty = denominator[i] == Acc(0) ? -1 : 0, none = any == nullptr ? empty : ~any[i];
        const Acc merged = base[i] + lambda * (numerator[i] / denominator[i]);
        numerator[i] = (none | empty) != 0 ? base[i] : merged;
        fallback[i] = none | empty;
        nobody -= none;
    }
    return nobody;
}

}  // namespace OTA_ISA
}  // namespace ota
