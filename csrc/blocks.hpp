// Merges of many strips at once, block by block in registers, for all words but `random by rank`: inputs of one type,
// edits from the base, a result of at most 32 bits. The operations and their order are those of stages.hpp and steps.hpp:
// results are equal bit for bit. salient.hpp has the common merge, which is faster still.
#pragma once

#include "doubles.hpp"
#include "marks.hpp"
#include "salient.hpp"
#include "steps.hpp"

namespace ota {
namespace OTA_ISA {

#if defined(OTA_LANES)

namespace lanes {

// Vectors of a block: with sums in float64 half as many.
template <typename Acc>
constexpr int kWide = OTA_LANES == 16 && std::is_same<Acc, float>::value ? 4 : 2;

template <typename W, typename Acc>
struct Blocks : Marks<W, kWide<Acc>> {
    static constexpr int V = kWide<Acc>;
    using Base = Marks<W, V>;
    using Base::tile, Base::offset, Base::sources, Base::edits, Base::keep, Base::top, Base::column, Base::kSize;
    using Base::fetch_ahead, Base::mark, Base::read_base, Base::read_curvature;
    using Sum = typename In<Acc>::Sums;

    const MergeArgs& args;
    const Form form;
    const bool plain;         // all edits are added, with a number each
    const bool open;          // whether scores in brackets are to wait
    bool counts, sums_weights;
    Sum fixed;                // D, where it is a number
    bool divides = true;      // that is not 1
    Bits top_merged = all(0u);  // the largest magnitude of the results
    Bits kept_by_some = all(0u), merged_of = all(0u);  // elements that somebody keeps; that do not fall back
    alignas(64) float curvatures[kSize];
    alignas(64) Acc plane[kSize];
    Floats products[kMaxExperts][V];  // votes, of experts whose votes are not their edits

    Blocks(const MergeArgs& args, int64_t offset, int64_t n)
        : Base(args.tile, offset, n), args(args), form(form_of(args.tile)), plain(is_plain(args.tile)),
          open(args.candidates != nullptr && has_spans(args.tile)) {
        const Words& words = tile.words;
        Acc sum = 0;
        for (int t = 0; t < tile.n_experts; ++t) sum += static_cast<Acc>(tile.experts[t].weight_scale);
        const bool number = words.divide == Divide::number, count = words.divide == Divide::kept_count;
        const bool weights = words.weigh == Weigh::constant && (plain || words.divide == Divide::weights);
        const Acc is = number ? static_cast<Acc>(tile.numbers.denominator) : sum;
        fixed = In<Acc>::all(static_cast<double>(is)), divides = !((number || weights) && is == Acc(1));
        counts = words.weigh == Weigh::alone || count, sums_weights = !number && !count && !weights;
    }

    const Floats* votes(int t) const { return tile.experts[t].vote == 1.0f ? edits[t] : products[t]; }

    // The sum of the votes.
    void vote(const Floats* of_one, const Mask* m, Floats* sums) const {
        const Floats zero = all(0.0f);
        for (int v = 0; v < V; ++v) {
            if (tile.words.elect != Elect::count) {
                sums[v] = add_where(m[v], sums[v], of_one[v]);
            } else {
                sums[v] = add_where(above(m[v], of_one[v], zero), sums[v], all(1.0f));
                sums[v] = add_where(above(m[v], zero, of_one[v]), sums[v], all(-1.0f));
            }
        }
    }

    // The last of the largest votes: from the last expert on, whose vote was the largest so far and stays it.
    void keep_largest() {
        Floats most[V];
        Mask taken[V];
        for (int v = 0; v < V; ++v) most[v] = all(-1.0f), taken[v] = nowhere();
        for (int t = 0; t < tile.n_experts; ++t)
            for (int v = 0; v < V; ++v) {
                const Floats of_one = size(votes(t)[v]);
                keep[t][v] = both(keep[t][v], at_least(of_one, most[v]));
                most[v] = choose(keep[t][v], of_one, most[v]);
            }
        for (int t = tile.n_experts; t-- > 0;)
            for (int v = 0; v < V; ++v) {
                keep[t][v] = without(keep[t][v], taken[v]);
                taken[v] = either(taken[v], keep[t][v]);
            }
    }

    void keep_agreeing(const Floats* sums) {
        const Floats share = all(tile.numbers.agreement);
        Bits agreeing[V];
        for (int v = 0; v < V; ++v) agreeing[v] = all(0u);
        for (int t = 0; t < tile.n_experts; ++t)
            for (int v = 0; v < V; ++v) {
                const Floats of_one = votes(t)[v], bound = mul(share, size(sub(sums[v], of_one)));
                agreeing[v] = count(agreeing[v], above(keep[t][v], size(of_one), bound));
            }
        const int32_t needed = tile.numbers.needed < 0 ? 0 : tile.numbers.needed;
        for (int v = 0; v < V; ++v) {
            const Mask enough = at_most(all(static_cast<uint32_t>(needed)), agreeing[v]);
            for (int t = 0; t < tile.n_experts; ++t) keep[t][v] = both(keep[t][v], enough);
        }
    }

    // The votes of a sign.
    struct Sign {
        Mask some;  // where there is one
        Bits bit;
    };

    Sign sign_of(Floats sum) const {
        const Floats zero = all(0.0f), elected = choose(equal(sum, zero), all(tile.numbers.tie), sum);
        return {either(above(elected, zero), above(zero, elected)), both(bits(elected), all(0x80000000u))};
    }

    // As same_sign: a vote, its own sign flipped where the elected one is negative, is above 0.
    static Mask agrees(Mask keep, const Sign& sign, Floats of_one) {
        return above(both(keep, sign.some), flip(of_one, sign.bit), all(0.0f));
    }

    void keep_same_sign(const Floats* sums) {
        for (int v = 0; v < V; ++v) {
            const Sign sign = sign_of(sums[v]);
            for (int t = 0; t < tile.n_experts; ++t) keep[t][v] = agrees(keep[t][v], sign, votes(t)[v]);
        }
    }

    // P of expert t, where it is not one number.
    void weigh(const Source& x, int i, const Bits* adders, Sum* p) {
        const Expert& e = *x.expert;
        const Sum a = In<Acc>::all(e.weight_scale), epsilon = In<Acc>::all(tile.numbers.epsilon);
        switch (tile.words.weigh) {
            case Weigh::constant:
                for (int v = 0; v < V; ++v) p[v] = a;
                return;
            case Weigh::curvature: {
                Floats h[V];
                read_curvature(x, i, h);
                for (int v = 0; v < V; ++v) top = larger(top, bits(h[v]));
                if (form == Form::plane) {
                    for (int v = 0; v < V; ++v) store(curvatures + v * OTA_LANES, h[v]);
                    power(curvatures, tile.numbers.power, kSize, plane);
                    for (int v = 0; v < V; ++v) p[v] = fma(In<Acc>::load(plane + v * OTA_LANES), a, epsilon);
                } else {
                    for (int v = 0; v < V; ++v) {
                        const Sum wide = In<Acc>::of(h[v]);
                        p[v] = fma(form == Form::root ? sqrt(wide) : wide, a, epsilon);
                    }
                }
                return;
            }
            case Weigh::alone: {
                const Sum of_one = mul(a, In<Acc>::all(e.alone));
                for (int v = 0; v < V; ++v) p[v] = choose(equal(adders[v], all(1u)), of_one, a);
                return;
            }
            case Weigh::by_row:
                for (int v = 0; v < V; ++v) p[v] = In<Acc>::all(x.row_weight);
                return;
            case Weigh::by_column:
                for (int v = 0; v < V; ++v) p[v] = In<Acc>::load(e.weights_at + column + i + v * OTA_LANES);
                return;
        }
    }

    // Expert t's y, before it is scaled.
    void find_edits(const Source& x, int i, const Floats* d, const Floats* b, Sum* y) const {
        for (int v = 0; v < V; ++v) {
            if constexpr (std::is_same<Acc, float>::value) {
                y[v] = d[v];
            } else {
                y[v] = sub(In<Acc>::of(W::read(x.w, i + v * OTA_LANES)), In<Acc>::of(b[v]));
            }
            if (tile.words.edit != Edit::clipped) continue;
            const Sum zero = In<Acc>::all(0), one = In<Acc>::all(1);
            const Sum most = In<Acc>::all(tile.numbers.clip), tiny = In<Acc>::all(1e-6);
            const Sum share = div(most, larger(tiny, size(y[v])));
            y[v] = mul(smaller(one, larger(zero, share)), y[v]);
        }
    }

    // N and D of edits that are kept, and elected, as mask(t, v) says. Constant: whether each expert's P is a number.
    template <bool Constant, typename Where>
    void add_up(int i, const Floats* b, const Bits* adders, Where where, Sum* numerator, Sum* denominator) {
        const bool kept_weights = tile.words.divide == Divide::kept_weights;
        Sum sums[V], weights[V];
        for (int v = 0; v < V; ++v) sums[v] = weights[v] = In<Acc>::all(0);
        for (int t = 0; t < tile.n_experts; ++t) {
            const Source& x = sources[t];
            Sum p[V], y[V];
            Mask m[V];
            for (int v = 0; v < V; ++v) p[v] = In<Acc>::all(x.expert->weight_scale), m[v] = where(t, v);
            if (!Constant) weigh(x, i, adders, p);
            find_edits(x, i, edits[t], b, y);
            if (x.expert->edit_scale != 1)
                for (int v = 0; v < V; ++v) y[v] = mul(In<Acc>::all(x.expert->edit_scale), y[v]);
            for (int v = 0; v < V; ++v)
                sums[v] = Constant && form == Form::voted ? add_where(m[v], sums[v], mul(p[v], y[v]))
                                                          : fma_where(m[v], p[v], y[v], sums[v]);
            if (!sums_weights) continue;
            for (int v = 0; v < V; ++v)
                weights[v] = kept_weights ? add_where(m[v], weights[v], p[v]) : add(weights[v], p[v]);
        }
        for (int v = 0; v < V; ++v) numerator[v] = sums[v], denominator[v] = weights[v];
    }

    void add_up(int i, const Floats* b, const Floats* sums, Sum* numerator, Sum* denominator, Bits* adders) {
        const Elect elects = tile.words.elect;
        const auto kept = [&](int t, int v) { return keep[t][v]; };
        const bool signs = elects == Elect::sum || elects == Elect::count;
        if (tile.words.weigh == Weigh::constant && !counts && signs) {
            Sign sign[V];
            for (int v = 0; v < V; ++v) sign[v] = sign_of(sums[v]);
            const auto elected = [&](int t, int v) { return agrees(keep[t][v], sign[v], votes(t)[v]); };
            return add_up<true>(i, b, adders, elected, numerator, denominator);
        }
        if (elects == Elect::largest) keep_largest();
        if (elects == Elect::agreement) keep_agreeing(sums);
        if (signs) keep_same_sign(sums);
        if (counts) count_adders(adders);
        tile.words.weigh == Weigh::constant ? add_up<true>(i, b, adders, kept, numerator, denominator)
                                            : add_up<false>(i, b, adders, kept, numerator, denominator);
    }

    // N of all edits with a number each.
    void add_plainly(int i, const Floats* b, Sum* numerator) {
        Sum sums[V], wide[V];
        for (int v = 0; v < V; ++v) sums[v] = In<Acc>::all(0), wide[v] = In<Acc>::of(b[v]);
        for (int t = 0; t < tile.n_experts; ++t) {
            const Source& x = sources[t];
            fetch_ahead(x, i);
            const Sum a = In<Acc>::all(x.expert->weight_scale), scale = In<Acc>::all(x.expert->edit_scale);
            for (int v = 0; v < V; ++v) {
                const Sum y = sub(In<Acc>::of(W::read(x.w, i + v * OTA_LANES)), wide[v]);
                sums[v] = fma(a, mul(scale, y), sums[v]);
            }
        }
        Bits suspect = top;
        for (int v = 0; v < V; ++v)
            suspect = larger(suspect, magnitude(In<Acc>::narrowed(sums[v]))), numerator[v] = sums[v];
        top = suspect;
    }

    // D as it divides.
    void finish_denominator(const Bits* adders, Sum* denominator) const {
        const Numbers& x = tile.numbers;
        for (int v = 0; v < V; ++v) {
            if (counts && tile.words.divide == Divide::kept_count) {
                const Floats n = sub(floats(add(adders[v], all(0x4b000000u))), all(0x1p23f));  // the bits of 2^23 + n
                denominator[v] = In<Acc>::of(larger(all(1.0f), n));
            } else if (!sums_weights) {
                denominator[v] = fixed;
            }
            if (tile.words.divide == Divide::kept_weights && x.least > 0)
                denominator[v] = larger(In<Acc>::all(x.least), denominator[v]);
            if (x.zero_is_one) denominator[v] = choose(is_zero(denominator[v]), In<Acc>::all(1), denominator[v]);
        }
    }

    template <typename Write>
    void write(int i, const Sum* merged, Write one) {
        Bits largest = top_merged;
        for (int v = 0; v < V; ++v) {
            const Floats found = In<Acc>::narrowed(merged[v]);
            largest = larger(largest, magnitude(found));
            one(offset + i + v * OTA_LANES, found);
        }
        top_merged = largest;
    }

    void write(int i, const Sum* merged) {
        auto* halves = reinterpret_cast<uint16_t*>(args.out);
        if constexpr (std::is_same<Acc, double>::value)
            return write(i, merged, [&](int64_t at, Floats x) { store(reinterpret_cast<float*>(args.out) + at, x); });
        else if (args.out_dtype == DType::bf16)
            return write(i, merged, [&](int64_t at, Floats x) { store_low_halves(halves + at, bf16_of(x)); });
        else
            return write(i, merged, [&](int64_t at, Floats x) { store_f16(halves + at, x); });
    }

    // Which edits are kept, and survive: edits, keep. any: whether somebody keeps the element.
    void find_kept(int i, const Floats* b, Waiting& waiting, Mask* any, Floats* votes_of_all) {
        Floats sums[V];
        Mask waits[V];
        const Elect elects = tile.words.elect;
        for (int v = 0; v < V; ++v) any[v] = waits[v] = nowhere(), sums[v] = all(0.0f);
        mark(i, b, open ? waits : nullptr, false, [&](int t, const Floats* d, Mask* m) {
            const Expert& e = tile.experts[t];
            for (int v = 0; v < V; ++v) any[v] = either(any[v], m[v]);
            for (int v = 0; e.trim > 0 && v < V; ++v) m[v] = both(m[v], at_least(size(d[v]), all(e.trim)));
            for (int v = 0; v < V; ++v) keep[t][v] = m[v];
            if (elects == Elect::none) return;
            Floats of_one[V];
            for (int v = 0; v < V; ++v) of_one[v] = d[v];
            if (e.vote != 1.0f)
                for (int v = 0; v < V; ++v) products[t][v] = of_one[v] = mul(all(e.vote), d[v]);
            if (elects != Elect::largest) vote(of_one, m, sums);
        });
        if (open) wait(i, waits, waiting);
        for (int v = 0; v < V; ++v) votes_of_all[v] = sums[v];
    }

    void wait(int i, const Mask* waits, Waiting& waiting) const {
        for (int v = 0; v < V; ++v)
            for (uint32_t rest = lanes_of(waits[v]); rest != 0; rest &= rest - 1)
                waiting.at[waiting.count++] = static_cast<uint32_t>(offset + i + v * OTA_LANES + __builtin_ctz(rest));
    }

    // Results, from N and D, of elements that somebody keeps.
    void divide(int i, const Floats* b, const Mask* any, const Sum* numerator, const Sum* denominator) {
        const Sum lambda = In<Acc>::all(tile.numbers.lambda);
        Bits merged = merged_of;
        Sum result[V];
        for (int v = 0; v < V; ++v) {
            const Mask some = any == nullptr ? nonzero(denominator[v]) : both(any[v], nonzero(denominator[v]));
            const Sum wide = In<Acc>::of(b[v]), mean = divides ? div(numerator[v], denominator[v]) : numerator[v];
            result[v] = choose(some, add(wide, mul(lambda, mean)), wide);
            merged = count(merged, some);
        }
        merged_of = merged;
        write(i, result);
    }

    void block(int i, Waiting& waiting) {
        Floats b[V], votes[V];
        Sum numerator[V], denominator[V];
        Mask any[V];
        Bits adders[V];
        read_base(i, b);
        find_kept(i, b, waiting, any, votes);
        Bits kept = kept_by_some;
        for (int v = 0; v < V; ++v) kept = count(kept, any[v]);
        kept_by_some = kept;
        add_up(i, b, votes, numerator, denominator, adders);
        finish_denominator(adders, denominator);
        divide(i, b, any, numerator, denominator);
    }

    void plain_block(int i) {
        Floats b[V];
        Sum numerator[V], denominator[V];
        read_base(i, b);
        add_plainly(i, b, numerator);
        finish_denominator(nullptr, denominator);
        divide(i, b, nullptr, numerator, denominator);
    }

    void count_adders(Bits* adders) const {
        for (int v = 0; v < V; ++v) adders[v] = all(0u);
        for (int t = 0; t < tile.n_experts; ++t)
            for (int v = 0; v < V; ++v) adders[v] = count(adders[v], keep[t][v]);
    }
};

template <typename W, typename Acc>
bool merge_blocks(const MergeArgs& args, int64_t offset, int n, MergeStats& stats, Waiting& waiting) {
    const Tile& tile = args.tile;
    Blocks<W, Acc> x(args, offset, n);
    const int before = waiting.count;
    in_rows(x, n, [&](int begin, int end) {
        for (int i = begin; i < end; i += x.kSize) x.plain ? x.plain_block(i) : x.block(i, waiting);
    });
    const double most = largest_finite(args.out_dtype);  // of float64 sums: what is beyond is infinite as it is stored
    const uint32_t limit = std::is_same<Acc, double>::value ? kSuspect - 1 : bit_cast<uint32_t>(static_cast<float>(most));
    const bool falls_back = total(x.merged_of) < n && !(tile.numbers.fallback_to_base && tile.has_base());
    if (largest(x.top) >= kSuspect || largest(x.top_merged) > limit || falls_back) {
        waiting.count = before;
        return false;
    }
    for (int t = 0; t < tile.n_experts; ++t) stats.kept[t] += x.plain ? n : total(x.sources[t].kept);
    stats.unkept += x.plain ? 0 : n - total(x.kept_by_some);
    return true;
}

}  // namespace lanes

// The function that merges whole strips of such a tile; none where they have to go through all steps.
inline InRegisters blocks(const MergeArgs& args) {
    using namespace lanes;
    const Tile& tile = args.tile;
    const bool wide = args.out_dtype == DType::f32;
    if (args.out_dtype == DType::f64 || !are_marked_in_blocks(tile, wide ? kWide<double> * OTA_LANES : kWide<float> * OTA_LANES))
        return nullptr;
    return with_type(tile.experts[0].weights.dtype, [&](auto type) -> InRegisters {
        using W = decltype(type);
        return wide ? merge_blocks<W, double> : merge_blocks<W, float>;
    });
}

#else

inline InRegisters blocks(const MergeArgs&) { return nullptr; }

#endif

}  // namespace OTA_ISA
}  // namespace ota
