// One strip through all steps: mark (which edits are kept), elect (which of these are added), add, finish.
#pragma once

#include "add.hpp"
#include "strip.hpp"

namespace ota {
namespace OTA_ISA {

template <typename Acc>
struct Merge {
    const MergeArgs& args;
    MergeStats& stats;
    Strip<Acc>& x;
    bool flags;  // whether scores in brackets are to be flagged
};

inline bool has_spans(const Tile& tile) {
    bool some = false;
    for (int t = 0; t < tile.n_experts; ++t) some |= tile.experts[t].span != 0;
    return some;
}

inline bool has_trims(const Tile& tile) {
    bool some = false;
    for (int t = 0; t < tile.n_experts; ++t) some |= tile.experts[t].trim > 0;
    return some;
}

// Mark.

// Whether expert t's edits are needed as a plane, besides where they are added.
inline bool needs_edits(const Tile& tile, int t) {
    const Score score = tile.words.score;
    return score == Score::saliency || score == Score::magnitude || score == Score::row_magnitude ||
           tile.experts[t].trim > 0 || tile.words.elect != Elect::none;
}

// Expert t's scores, from its edits; none where no word asks for them.
template <typename Acc>
const float* score(const Tile& tile, int t, Strip<Acc>& x) {
    const Words& words = tile.words;
    if (words.score != Score::spread && needs_edits(tile, t)) find_edits(tile, t, x);
    const bool bounded =
        words.select == Select::at_least || words.select == Select::between || words.select == Select::above;
    return words.score != Score::none || bounded ? find_scores(tile, t, x) : nullptr;
}

// Which edits expert t keeps, and its scores. Returns whether some input of it or the base may not be usable. Has its
// next strip fetched.
template <typename Acc>
bool keep(const Tile& tile, int t, Strip<Acc>& x, const float*& s, int64_t& kept) {
    const Expert& e = tile.experts[t];
    const Words& words = tile.words;
    if (words.score == Score::saliency && words.select == Select::at_least && !has_ties(e)) {
        uint32_t top;  // of usable inputs the score is a number >= 0, unless it overflows
        find_saliencies(tile, t, x);
        s = x.score_room;
        kept += keep_at_least(s, e.threshold, x.n, x.keep[t], x.any, top);
        return top >= kSuspect;
    }
    const bool suspect = is_suspect(tile, t, x);
    s = score(tile, t, x);
    select(tile, t, s, x);
    kept += count_kept(x.keep[t], x.n, x.any);
    return suspect;
}

// Which edits each expert keeps, x.keep, and what is counted of it. Returns whether some input is not usable.
template <typename Acc>
bool mark(const Merge<Acc>& m, bool bad_base) {
    const Tile& tile = m.args.tile;
    MergeStats& stats = m.stats;
    Strip<Acc>& x = m.x;
    bool bad = bad_base;
    std::memset(x.any, 0, sizeof(x.any));
    if (m.flags) std::memset(x.waits, 0, sizeof(x.waits));
    share_scores(tile, x);
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        const float* s;
        const bool bad_here = keep(tile, t, x, s, stats.kept[t]) &&
                              count_unusable(tile, t, x, stats.weights[t], stats.curvature[t]);
        bad |= bad_here;
        if (m.flags && e.span) flag_undecided(s, e, x.n, x.waits);
        if (e.census == nullptr) continue;
        alignas(64) int32_t usable[kStrip];
        alignas(64) float used[kStrip];
        if (bad_base || bad_here) find_usable(tile, t, x, usable);
        use(s, bad_base || bad_here ? usable : nullptr, x.n, used);
        take_census(used, e, x.n);
    }
    return bad;
}

// Elect.

template <typename Acc>
void elect(const Tile& tile, Strip<Acc>& x) {
    const Words& words = tile.words;
    const Numbers& numbers = tile.numbers;
    const int n = x.n, n_experts = tile.n_experts;
    for (int t = 0; t < n_experts; ++t)
        if (tile.experts[t].trim > 0) trim(x.edits[t], tile.experts[t].trim, n, x.keep[t]);
    if (words.elect == Elect::none) return;
    if (words.edit == Edit::by_chance)
        for (int t = 0; t < n_experts; ++t) {
            const float* p = x.chances + t * tile.n + x.offset;
            for (int i = 0; i < n; ++i) x.edits[t][i] /= p[i];
        }
    const auto each = [&](auto step) {
        for (int t = 0; t < n_experts; ++t) step(t, x.edits[t], tile.experts[t].vote, x.keep[t]);
    };
    if (words.elect == Elect::largest) {
        for (int i = 0; i < n; ++i) x.largest[i] = -1.0f, x.number[i] = -1;
        each([&](int t, const float* d, float vote, int32_t* keep) {
            largest_vote(d, vote, keep, t, n, x.largest, x.number);
        });
        each([&](int t, const float*, float, int32_t* keep) {
            for (int i = 0; i < n; ++i) keep[i] = x.number[i] == t ? -1 : 0;
        });
        return;
    }
    std::memset(x.elected, 0, sizeof(x.elected));
    each([&](int, const float* d, float vote, int32_t* keep) {
        words.elect == Elect::count ? count_votes(d, vote, keep, n, x.elected) : sum_votes(d, vote, keep, n, x.elected);
    });
    if (words.elect != Elect::agreement) {
        each([&](int, const float* d, float vote, int32_t* keep) {
            same_sign(x.elected, d, vote, numbers.tie, n, keep);
        });
        return;
    }
    std::memset(x.number, 0, sizeof(x.number));
    each([&](int, const float* d, float vote, int32_t* keep) {
        count_agreeing(x.elected, d, vote, numbers.agreement, keep, n, x.number);
    });
    each([&](int, const float*, float, int32_t* keep) {
        for (int i = 0; i < n; ++i) keep[i] &= x.number[i] >= numbers.needed ? -1 : 0;
    });
}

// Add.

inline Form form_of(const Tile& tile) {
    const double power = tile.numbers.power;
    switch (tile.words.weigh) {
        case Weigh::constant: return tile.words.elect == Elect::none ? Form::number : Form::voted;
        case Weigh::curvature: return power == 0.5 ? Form::root : power == 1.0 ? Form::linear : Form::plane;
        default: return Form::plane;
    }
}

// P of each element of expert t, into room number `room`.
template <typename Acc>
const Acc* weight_plane(const Tile& tile, int t, int room, Strip<Acc>& x) {
    const Expert& e = tile.experts[t];
    Acc* p = x.p_room[room];
    switch (tile.words.weigh) {
        case Weigh::curvature: powers(curvature(tile, t, room, x), tile.numbers, e.weight_scale, x.n, p); break;
        case Weigh::alone: alone(x.number, e.weight_scale, e.alone, x.n, p); break;
        case Weigh::by_row:
        case Weigh::by_column:
            by_rows(x.place, x.n, [&](int begin, int end, int64_t row, int64_t column) {
                const int64_t by_column = tile.words.weigh == Weigh::by_column ? 1 : 0;
                const double* weights = e.weights_at + (by_column ? column : row);
                for (int i = begin; i < end; ++i) p[i] = static_cast<Acc>(weights[(i - begin) * by_column]);
            });
            break;
        case Weigh::constant: break;
    }
    return p;
}

// One group of experts; W: the type that their weights are read as. Edits that are not w - w_0 are planes of their own.
template <Form F, typename W, typename Acc>
void add_group(const Tile& tile, int first, int size, Strip<Acc>& x) {
    Added<W, Acc> experts[kGroup] = {};
    const bool all = tile.words.select == Select::all && !has_trims(tile) && tile.words.elect == Elect::none;
    const Acc* from = x.base;
    for (int g = 0; g < size; ++g) {
        const int t = first + g;
        const Expert& e = tile.experts[t];
        Added<W, Acc>& one = experts[g];
        one.w = view(e.weights, x.offset, x.n, reinterpret_cast<W*>(x.w_room[g]));
        if (F == Form::root || F == Form::linear) one.h = curvature(tile, t, g, x);
        if (F == Form::plane) one.p = weight_plane(tile, t, g, x);
        one.keep = all ? x.ones : x.keep[t];
        one.counted = tile.words.divide == Divide::kept_weights ? one.keep : x.ones;
        one.weight_scale = static_cast<Acc>(e.weight_scale), one.edit_scale = static_cast<Acc>(e.edit_scale);
        from = origin(tile, t, x);
    }
    const Acc epsilon = static_cast<Acc>(tile.numbers.epsilon);
    if (tile.words.edit != Edit::difference) {
        alignas(64) Acc edit[kStrip];
        tile.words.edit == Edit::clipped
            ? clipped(experts[0].w, from, tile.numbers.clip, x.n, edit)
            : by_chance(experts[0].w, from, x.chances + first * tile.n + x.offset, x.n, edit);
        Added<Acc, Acc> one = {edit, experts[0].h, experts[0].p, experts[0].keep, experts[0].counted,
                               experts[0].weight_scale, experts[0].edit_scale};
        add<1, F>(&one, x.n, epsilon, x.zeros, x.numerator, x.denominator);
        return;
    }
    with_size<kMost<Acc>>(size, [&](auto g) {
        add<decltype(g)::value, F>(experts, x.n, epsilon, from, x.numerator, x.denominator);
    });
}

template <Form F, typename Acc>
void add_all(const Tile& tile, Strip<Acc>& x) {
    bool alone = tile.words.edit != Edit::difference;  // edits that are not w - w_0 are added one by one
    for (int t = 0; t < tile.n_experts; ++t) alone |= tile.experts[t].origin.data != nullptr;
    by_groups(tile.n_experts, alone ? 1 : kMost<Acc>, [&](int first, int size) {
        x.direct ? add_group<F, Direct<Acc>>(tile, first, size, x) : add_group<F, float>(tile, first, size, x);
    });
}

// Whether all edits are added, with a number each.
inline bool is_plain(const Tile& tile) {
    const Words& words = tile.words;
    bool plain = words.edit == Edit::difference && words.select == Select::all && words.elect == Elect::none &&
                 words.weigh == Weigh::constant && words.divide != Divide::kept_count;
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        plain &= e.origin.data == nullptr && !(e.trim > 0) && e.span == 0 && e.census == nullptr;
    }
    return plain && !words.read_curvature();
}

template <typename W, typename Acc>
void add_plain_groups(const Tile& tile, Strip<Acc>& x) {
    by_groups(tile.n_experts, kMost<Acc>, [&](int first, int size) {
        Plain<W, Acc> experts[kGroup];
        for (int g = 0; g < size; ++g) {
            const Expert& e = tile.experts[first + g];
            const W* w = view(e.weights, x.offset, x.n, reinterpret_cast<W*>(x.w_room[g]));
            experts[g] = {w, static_cast<Acc>(e.weight_scale), static_cast<Acc>(e.edit_scale),
                          Ahead(e.weights, x.offset, tile.n)};
        }
        with_size<kMost<Acc>>(size, [&](auto g) { add_plain<decltype(g)::value>(experts, x.n, x.base, x.numerator); });
    });
}

// Whether N is finite; else an input may not be usable.
template <typename Acc>
bool is_sum_usable(Strip<Acc>& x) {
    Suspicions found;
    found.look(x.numerator, x.n, Ahead(), [](Acc sum) { return suspicion(static_cast<float>(sum)); });
    return !found.any();
}

// N of such a tile. False where an input may not be usable.
template <typename Acc>
bool add_plain(const Tile& tile, Strip<Acc>& x) {
    std::memset(x.numerator, 0, sizeof(x.numerator));
    x.direct ? add_plain_groups<Direct<Acc>>(tile, x) : add_plain_groups<float>(tile, x);
    return is_sum_usable(x);
}

// How many experts add each element.
template <typename Acc>
void count_adders(const Tile& tile, Strip<Acc>& x) {
    std::memset(x.number, 0, sizeof(x.number));
    for (int t = 0; t < tile.n_experts; ++t)
        for (int i = 0; i < x.n; ++i) x.number[i] -= x.keep[t][i];
}

template <typename Acc>
void clear_sums(Strip<Acc>& x) {
    std::memset(x.numerator, 0, sizeof(x.numerator));
    std::memset(x.denominator, 0, sizeof(x.denominator));
}

// The sums of the experts before this tile's, and whether one of them keeps the element.
template <typename Acc>
void load_sums(const Sums& sums, Strip<Acc>& x) {
    const auto offset = sizeof(Acc) * static_cast<size_t>(x.offset), bytes = sizeof(Acc) * static_cast<size_t>(x.n);
    std::memcpy(x.numerator, sums.numerator + offset, bytes);
    std::memcpy(x.denominator, sums.denominator + offset, bytes);
    for (int i = 0; i < x.n; ++i) {
        const int32_t before = std::signbit(x.denominator[i]) ? 0 : -1;
        x.any[i] = sums.removes ? before : x.any[i] | before;
        x.denominator[i] = std::fabs(x.denominator[i]);
    }
}

template <typename Acc>
void save_sums(const Merge<Acc>& m) {
    Strip<Acc>& x = m.x;
    const Sums& sums = m.args.sums;
    const auto offset = sizeof(Acc) * static_cast<size_t>(x.offset), bytes = sizeof(Acc) * static_cast<size_t>(x.n);
    alignas(64) Acc signed_[kStrip];
    for (int i = 0; i < x.n; ++i) {
        if (sums.removes && m.args.tile.words.divide == Divide::kept_weights && x.denominator[i] == Acc(0)) x.any[i] = 0;
        signed_[i] = x.any[i] ? x.denominator[i] : -x.denominator[i];
    }
    std::memcpy(sums.new_numerator + offset, x.numerator, bytes);
    std::memcpy(sums.new_denominator + offset, signed_, bytes);
}

// N and D of the tile's experts, on top of what they hold.
template <typename Acc>
void add(const Tile& tile, Strip<Acc>& x) {
    if (tile.words.weigh == Weigh::alone || tile.words.divide == Divide::kept_count) count_adders(tile, x);
    switch (form_of(tile)) {
        case Form::number: return add_all<Form::number>(tile, x);
        case Form::voted: return add_all<Form::voted>(tile, x);
        case Form::root: return add_all<Form::root>(tile, x);
        case Form::linear: return add_all<Form::linear>(tile, x);
        case Form::plane: return add_all<Form::plane>(tile, x);
    }
}

// Finish.

template <typename Acc>
void find_denominator(const Tile& tile, Strip<Acc>& x) {
    const Numbers& numbers = tile.numbers;
    const Acc least = static_cast<Acc>(numbers.least), number = static_cast<Acc>(numbers.denominator);
    Acc* __restrict d = x.denominator;
    if (tile.words.divide == Divide::number)
        for (int i = 0; i < x.n; ++i) d[i] = number;
    if (tile.words.divide == Divide::kept_weights && numbers.least > 0)
        for (int i = 0; i < x.n; ++i) d[i] = d[i] < least ? least : d[i];
    if (tile.words.divide == Divide::kept_count)
        for (int i = 0; i < x.n; ++i) d[i] = static_cast<Acc>(x.number[i] > 1 ? x.number[i] : 1);
    if (numbers.zero_is_one)
        for (int i = 0; i < x.n; ++i) d[i] = d[i] == Acc(0) ? Acc(1) : d[i];
}

// The mean of the w_t where the strip falls back on it.
template <typename Acc>
void fall_back_to_mean(const Tile& tile, Strip<Acc>& x) {
    alignas(64) Acc mean[kStrip] = {};
    for (int t = 0; t < tile.n_experts; ++t)
        with_weights(tile, t, 0, x, [&](const auto* w) {
            for (int i = 0; i < x.n; ++i) mean[i] += static_cast<Acc>(w[i]);
        });
    for (int i = 0; i < x.n; ++i)
        x.numerator[i] = x.fallback[i] ? mean[i] / static_cast<Acc>(tile.n_experts) : x.numerator[i];
}

// The base value wherever some input of the element is not usable. An expert whose own inputs are not usable there does
// not keep the element.
template <typename Acc>
void repair(const Merge<Acc>& m, const int32_t (*selected)[kStrip]) {
    const Tile& tile = m.args.tile;
    Strip<Acc>& x = m.x;
    alignas(64) int32_t usable[kStrip], all[kStrip];
    std::memcpy(all, x.ones, sizeof(all));
    for (int t = 0; t < tile.n_experts; ++t) {
        find_usable(tile, t, x, usable);
        for (int i = 0; i < x.n; ++i) {
            all[i] &= usable[i];
            m.stats.kept[t] += selected[t][i] & ~usable[i];
        }
    }
    for (int i = 0; i < x.n; ++i) {
        x.numerator[i] = all[i] ? x.numerator[i] : x.base[i];
        m.stats.repaired += all[i] ? 0 : 1;
    }
}

// any: as for quotient.
template <typename Acc>
void divide(const Merge<Acc>& m, const int32_t* any) {
    const Tile& tile = m.args.tile;
    Strip<Acc>& x = m.x;
    find_denominator(tile, x);
    m.stats.unkept +=
        quotient(x.base, x.denominator, any, static_cast<Acc>(tile.numbers.lambda), x.n, x.numerator, x.fallback);
    if (tile.numbers.fallback_to_base && tile.has_base()) return;
    int32_t some = 0;
    for (int i = 0; i < x.n; ++i) some |= x.fallback[i];
    if (some) fall_back_to_mean(tile, x);
}

template <typename Acc>
void write(const Merge<Acc>& m) {
    m.stats.overflow += store(m.args.out_dtype, m.args.out, m.x.offset, m.x.n, m.x.numerator);
}

// From N on where all edits are added, with a number each (is_plain): D is one number.
template <typename Acc>
void finish_plain(const Merge<Acc>& m) {
    const Tile& tile = m.args.tile;
    Strip<Acc>& x = m.x;
    const int n = x.n;
    Acc weights = 0;
    for (int t = 0; t < tile.n_experts; ++t) weights += static_cast<Acc>(tile.experts[t].weight_scale);
    for (int t = 0; t < tile.n_experts; ++t) m.stats.kept[t] += n;
    x.denominator[0] = weights, x.n = 1;
    find_denominator(tile, x);
    x.n = n;
    const Acc d = x.denominator[0], lambda = static_cast<Acc>(tile.numbers.lambda);
    if (d == Acc(0)) {
        for (int i = 0; i < n; ++i) x.denominator[i] = weights;
        std::memset(x.any, 0xff, sizeof(x.any));
        divide(m, x.any);
    } else {
        for (int i = 0; i < n; ++i) x.numerator[i] = x.base[i] + lambda * (x.numerator[i] / d);
    }
    write(m);
}

// The strip through all steps; its place is set.
template <typename Acc>
void merge_strip(const Merge<Acc>& m) {
    const Tile& tile = m.args.tile;
    Strip<Acc>& x = m.x;
    load_base(tile, x);
    const Ahead next(tile.base, x.offset, tile.n);
    for (int begin = 0; begin < x.n; begin += kChunk) next.fetch(begin);
    bool bad = tile.has_base() && count_unusable_base(x, m.stats.base);
    const Sums& sums = m.args.sums;
    if (!bad && sums.new_numerator == nullptr && is_plain(tile) && add_plain(tile, x)) {
        finish_plain(m);
        return;
    }
    bad = mark(m, bad);
    int32_t selected[kMaxExperts][kStrip];  // elect changes the masks
    const bool repairs = bad && tile.numbers.repair;
    if (repairs) std::memcpy(selected, x.keep, sizeof(selected[0]) * static_cast<size_t>(tile.n_experts));
    elect(tile, x);
    sums.numerator != nullptr ? load_sums(sums, x) : clear_sums(x);
    add(tile, x);
    if (sums.new_numerator != nullptr) save_sums(m);
    divide(m, x.any);
    if (repairs) repair(m, selected);
    write(m);
}

}  // namespace OTA_ISA
}  // namespace ota
