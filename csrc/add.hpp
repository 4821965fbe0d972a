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

// All edits with a number each: N alone.
template <typename W, typename Acc>
struct Plain {
    const W* w;
    Acc weight_scale, edit_scale;
    Ahead next;
};

template <int G, typename W, typename Acc>
void add_plain(const Plain<W, Acc>* experts, int n, const Acc* __restrict base, Acc* __restrict numerator) {
    const W* w[G];
    Acc a[G], edit_scale[G];
    for (int g = 0; g < G; ++g)
        w[g] = experts[g].w, a[g] = experts[g].weight_scale, edit_scale[g] = experts[g].edit_scale;
    const auto some = [&](int begin, int end) {
#pragma GCC ivdep
        for (int i = begin; i < end; ++i) {
            Acc sum = numerator[i];
            const Acc b = base[i];
#pragma GCC unroll 8
            for (int g = 0; g < G; ++g) sum = std::fma(a[g], edit_scale[g] * (static_cast<Acc>(w[g][i]) - b), sum);
            numerator[i] = sum;
        }
    };
    int i = 0;
    for (; i + kChunk <= n; i += kChunk) {
        for (int g = 0; g < G; ++g) experts[g].next.fetch(i);
        some(i, i + kChunk);
    }
    if (i < n) some(i, n);
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
