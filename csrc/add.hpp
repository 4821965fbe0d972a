// Adds experts to the sums of a strip: N += g P y and D += P. The sums of a group of experts are in registers, which is
// why the number of experts is a template parameter; so are the form of P, the accumulator and the type of the weights.
#pragma once

#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

// How P comes: a number; a number, whose product with the edit is rounded before it is added (signs were elected); from
// the root of h, or h itself; or as a plane.
enum class Form { number, voted, root, linear, plane };

// One expert of a group.
template <typename W, typename Acc>
struct Added {
    const W* w;
    const float* h;
    const Acc* p;
    const int32_t *keep, *counted;  // where the edit is added to N; where P is to D
    Acc weight_scale, edit_scale;
    float threshold, score_scale;
    uint32_t span;
    Ahead next_w, next_h;
};

template <Form F, typename Acc>
inline Acc weight(float h, Acc a, Acc epsilon) {
    const Acc x = static_cast<Acc>(h);
    return F == Form::root ? std::fma(std::sqrt(x), a, epsilon) : F == Form::linear ? std::fma(x, a, epsilon) : a;
}

template <int G, Form F, typename W, typename Acc>
void add(const Added<W, Acc>* experts, int n, Acc epsilon, const Acc* __restrict origin, Acc* __restrict numerator,
         Acc* __restrict denominator) {
    const W* w[G];
    const float* h[G];
    const Acc* plane[G];
    const int32_t *keep[G], *counted[G];
    Acc a[G], edit_scale[G];
    for (int g = 0; g < G; ++g) {
        w[g] = experts[g].w, h[g] = experts[g].h, plane[g] = experts[g].p;
        keep[g] = experts[g].keep, counted[g] = experts[g].counted;
        a[g] = experts[g].weight_scale, edit_scale[g] = experts[g].edit_scale;
    }
#pragma GCC ivdep
    for (int i = 0; i < n; ++i) {
        Acc sum = numerator[i], weights = denominator[i];
        const Acc o = origin[i];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
            constexpr bool kReadsH = F == Form::root || F == Form::linear;
            const Acc p = F == Form::plane ? plane[g][i] : weight<F, Acc>(kReadsH ? h[g][i] : 0.0f, a[g], epsilon);
            const Acc y = edit_scale[g] * (static_cast<Acc>(w[g][i]) - o);
            const Acc added = F == Form::voted ? sum + p * y : std::fma(p, y, sum);
            sum = keep[g][i] ? added : sum;
            weights += counted[g][i] ? p : Acc(0);
        }
        numerator[i] = sum, denominator[i] = weights;
    }
}

// The common merge, of whole strips: kept are edits whose saliency reaches the threshold, D is the sum of kept P. Scores
// are not written anywhere. kept: of each expert; returns the largest suspicion of the inputs: usable ones have a score
// that is a number >= 0, unless it overflowed. Open: waits = 1 where a score lies in its bracket.
template <int G, Form F, bool Open, typename W, typename Acc>
uint32_t add_salient(const Added<W, Acc>* experts, Acc epsilon, const Acc* __restrict base, Acc* __restrict numerator,
                     Acc* __restrict denominator, int32_t* __restrict waits, int32_t* kept_out) {
    const W* w[G];
    const float* h[G];
    float threshold[G], k[G];
    Acc a[G];
    uint32_t lowest[G], span[G];
    int32_t kept[G];
    for (int g = 0; g < G; ++g) {
        w[g] = experts[g].w, h[g] = experts[g].h, a[g] = experts[g].weight_scale;
        threshold[g] = experts[g].threshold, k[g] = experts[g].score_scale;
        lowest[g] = bit_cast<uint32_t>(threshold[g]), span[g] = experts[g].span, kept[g] = 0;
    }
    uint32_t top = 0;
    for (int begin = 0; begin < kStrip; begin += kChunk) {
        for (int g = 0; g < G; ++g) experts[g].next_w.fetch(begin), experts[g].next_h.fetch(begin);
#pragma GCC ivdep
        for (int i = begin; i < begin + kChunk; ++i) {
            const Acc b = base[i];
            Acc sum = numerator[i], weights = denominator[i];
            int32_t wait = 0;
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) {
                const float d32 = static_cast<float>(w[g][i]) - static_cast<float>(b);
                const float s = saliency(h[g][i], d32, k[g]);
                const bool keep = s >= threshold[g];
                const Acc all = weight<F, Acc>(h[g][i], a[g], epsilon), p = keep ? all : Acc(0);
                kept[g] += keep ? 1 : 0;
                top = larger(top, bit_cast<uint32_t>(s));
                if (Open) wait |= bit_cast<uint32_t>(s) - lowest[g] < span[g] ? 1 : 0;
                weights += p;
                sum = std::fma(p, static_cast<Acc>(w[g][i]) - b, sum);
            }
            numerator[i] = sum, denominator[i] = weights;
            if (Open) waits[i] |= wait;
        }
    }
    for (int g = 0; g < G; ++g) kept_out[g] += kept[g];
    return top;
}

// Groups are as many as needed, and alike: 8 experts are 4 and 4. Calls step(first, size) for each.
template <typename Step>
inline void by_groups(int n_experts, int most, Step step) {
    int groups = (n_experts + most - 1) / most;
    for (int first = 0; first < n_experts; --groups) {
        const int size = (n_experts - first + groups - 1) / groups;
        step(first, size);
        first += size;
    }
}

// Most experts of a group. Sums in float64 take twice the registers.
template <typename Acc>
constexpr int kMost = std::is_same<Acc, double>::value ? 3 : kGroup;

template <int N> struct Size { static constexpr int value = N; };

// Calls step(Size<g>()), g from 1 to Most.
template <int Most, typename Step>
inline auto with_size(int g, Step step) {
    if constexpr (Most == 1) {
        return step(Size<1>());
    } else {
        if (g == Most) return step(Size<Most>());
        return with_size<Most - 1>(g, step);
    }
}

}  // namespace OTA_ISA
}  // namespace ota
