// Undecided elements of the common merge (salient.hpp), in registers: those that wait for one expert alone become its
// alternatives, as `resolve` in merge.cpp has it for any words.
#pragma once

#include "salient.hpp"

namespace ota {
namespace OTA_ISA {

// Takes those that become alternatives out of the m candidates from `from` on, and counts them. The others move up; returns
// how many they are: they wait for several experts, or something of them is not usable.
using Alone = int (*)(const MergeArgs& args, int64_t from, int m, MergeStats& stats);

#if defined(OTA_LANES)

namespace lanes {

template <Form F, typename W>
int take_alone(const MergeArgs& args, int64_t from, int m, MergeStats& stats) {
    const Tile& tile = args.tile;
    Candidates& c = *args.candidates;
    const Floats epsilon = all(static_cast<float>(tile.numbers.epsilon));
    const Floats lambda = all(static_cast<float>(tile.numbers.lambda));
    const auto limit = bit_cast<uint32_t>(static_cast<float>(largest_finite(args.out_dtype)));
    int left = 0;
    for (int j = 0; j < m; j += OTA_LANES) {
        const int64_t at = from + j;
        const Floats b = W::read(c.base + W::size * at, 0);
        Floats numerator = all(0.0f), denominator = all(0.0f);
        Bits top = all(0u), experts = all(0u), steps = all(0u);
        Mask some = nowhere(), several = nowhere(), kept = nowhere();
        for (int t = 0; t < tile.n_experts; ++t) {
            const Expert& e = tile.experts[t];
            const uint32_t lowest = bit_cast<uint32_t>(e.threshold);
            const Floats d = sub(W::read(c.weights[t] + W::size * at, 0), b), h = load(c.curvature[t] + at);
            const Floats scaled = mul(d, all(65536.0f)), s = mul(mul(h, all(e.score_scale)), mul(scaled, scaled));
            const Mask reached = at_least(s, all(e.threshold));
            const Mask inside = not_at_least(reached, s, all(bit_cast<float>(lowest + e.span)));
            const Mask keep = without(reached, inside);
            several = either(several, both(some, inside)), some = either(some, inside), kept = either(kept, keep);
            experts = bits(choose(inside, floats(all(static_cast<uint32_t>(t))), floats(experts)));
            steps = bits(choose(inside, floats(sub(bits(s), all(lowest))), floats(steps)));
            top = larger(top, bits(s));
            const Floats root = F == Form::root ? sqrt(h) : h;
            const Floats p = zero_unless(keep, fma(root, all(static_cast<float>(e.weight_scale)), epsilon));
            denominator = add(denominator, p);
            numerator = fma(p, d, numerator);
        }
        const Floats edit = mul(lambda, div(numerator, denominator));
        const Floats merged = choose(is_zero(denominator), b, add(b, edit));
        const Mask usable = both(at_most(top, all(kSuspect - 1)), at_most(magnitude(merged), all(limit)));
        const uint32_t by_one = lanes_of(both(usable, without(some, several))), by_others = lanes_of(kept);
        alignas(64) uint32_t expert[OTA_LANES], step[OTA_LANES];
        alignas(64) uint16_t halves[OTA_LANES];
        store(expert, experts), store(step, steps);
        args.out_dtype == DType::bf16 ? store_low_halves(halves, bf16_of(merged)) : store_f16(halves, merged);
        for (int lane = 0; lane < OTA_LANES && j + lane < m; ++lane) {
            const uint32_t index = c.index[at + lane];
            if (!(by_one >> lane & 1) || !is_stored_finite(args, index)) {
                move(tile, c, at + lane, from + left++);
                continue;
            }
            const uint32_t t = expert[lane];
            Alternatives& a = c.alternatives[t];
            a.index[a.count] = index | (by_others >> lane & 1 ? 0u : 1u << 31);
            a.steps[a.count] = step[lane];
            std::memcpy(a.merged + 2 * a.count++, halves + lane, 2);
            --stats.kept[t], ++stats.reached[t];
        }
    }
    return left;
}

template <Form F>
Alone of_weights(const Tile& tile) {
    switch (tile.experts[0].weights.dtype) {
        case DType::bf16: return take_alone<F, BF16>;
        case DType::f16: return take_alone<F, F16>;
        default: return take_alone<F, F32>;
    }
}

}  // namespace lanes

// The function for a tile that `salient` merges; none where any words are resolved in one way.
inline Alone alone(const MergeArgs& args) {
    const Tile& tile = args.tile;
    if (tile.n > kFlag) return nullptr;
    return tile.numbers.power == 1.0 ? lanes::of_weights<Form::linear>(tile) : lanes::of_weights<Form::root>(tile);
}

#else

inline Alone alone(const MergeArgs&) { return nullptr; }

#endif

}  // namespace OTA_ISA
}  // namespace ota
