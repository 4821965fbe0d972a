// One tile in, one merged tile out, strip by strip, with nothing intermediate in memory: read, mark (which edits are
// kept), elect (which of these are added), add, finish. Single-threaded; the engine runs one tile per thread.
//
// The common merge takes whole strips in one step (salient.hpp); one that it finds something wrong with goes through all
// of them after all.

#include "salient.hpp"

namespace ota {
namespace OTA_ISA {
namespace {

template <typename Acc>
struct Merge {
    const MergeArgs& args;
    MergeStats& stats;
    Strip<Acc>& x;
    bool flags;  // whether scores in brackets are to be flagged
};

bool has_spans(const Tile& tile) {
    bool some = false;
    for (int t = 0; t < tile.n_experts; ++t) some |= tile.experts[t].span != 0;
    return some;
}

bool has_trims(const Tile& tile) {
    bool some = false;
    for (int t = 0; t < tile.n_experts; ++t) some |= tile.experts[t].trim > 0;
    return some;
}

// Mark.

// Whether expert t's edits are needed as a plane, besides where they are added.
bool needs_edits(const Tile& tile, int t) {
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

Form form_of(const Tile& tile) {
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

// One group of experts; W: the type that their weights are read as. clipped edits are planes of their own.
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
    if (tile.words.edit == Edit::clipped) {
        alignas(64) Acc edit[kStrip];
        clipped(experts[0].w, from, tile.numbers.clip, x.n, edit);
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
    bool alone = tile.words.edit == Edit::clipped;  // edits that are not w - w_0 are added one by one
    for (int t = 0; t < tile.n_experts; ++t) alone |= tile.experts[t].origin.data != nullptr;
    by_groups(tile.n_experts, alone ? 1 : kMost<Acc>, [&](int first, int size) {
        x.direct ? add_group<F, Direct<Acc>>(tile, first, size, x) : add_group<F, float>(tile, first, size, x);
    });
}

// Whether all edits are added, with a number each.
bool is_plain(const Tile& tile) {
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

// N and D of such a tile. False where an input may not be usable: N is not finite then.
template <typename Acc>
bool add_plain(const Tile& tile, Strip<Acc>& x) {
    std::memset(x.numerator, 0, sizeof(x.numerator));
    x.direct ? add_plain_groups<Direct<Acc>>(tile, x) : add_plain_groups<float>(tile, x);
    Acc weights = 0;
    for (int t = 0; t < tile.n_experts; ++t) weights += static_cast<Acc>(tile.experts[t].weight_scale);
    for (int i = 0; i < x.n; ++i) x.denominator[i] = weights;
    Suspicions found;
    found.look(x.numerator, x.n, Ahead(), [](Acc sum) { return suspicion(static_cast<float>(sum)); });
    return !found.any();
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

template <typename Acc>
void add(const Tile& tile, Strip<Acc>& x) {
    clear_sums(x);
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

// The strip through all steps; its place is set.
template <typename Acc>
void merge_strip(const Merge<Acc>& m) {
    const Tile& tile = m.args.tile;
    Strip<Acc>& x = m.x;
    load_base(tile, x);
    const Ahead next(tile.base, x.offset, tile.n);
    for (int begin = 0; begin < x.n; begin += kChunk) next.fetch(begin);
    bool bad = tile.has_base() && count_unusable_base(x, m.stats.base);
    if (!bad && is_plain(tile) && add_plain(tile, x)) {
        for (int t = 0; t < tile.n_experts; ++t) m.stats.kept[t] += x.n;
        std::memset(x.any, 0xff, sizeof(x.any));
        divide(m, x.any);
        write(m);
        return;
    }
    bad = mark(m, bad);
    int32_t selected[kMaxExperts][kStrip];  // elect changes the masks
    const bool repairs = bad && tile.numbers.repair;
    if (repairs) std::memcpy(selected, x.keep, sizeof(selected[0]) * static_cast<size_t>(tile.n_experts));
    elect(tile, x);
    add(tile, x);
    divide(m, x.any);
    if (repairs) repair(m, selected);
    write(m);
}

// Scores of n elements from `offset` on, all usable, to the censuses.
template <typename Acc>
void take_censuses(const Tile& tile, int64_t offset, int n, Strip<Acc>& x) {
    for (int t = 0; t < tile.n_experts; ++t)
        for (int64_t at = offset; tile.experts[t].census != nullptr && at < offset + n; at += kStrip) {
            go_to(tile, at, x);
            load_base(tile, x);
            find_edits(tile, t, x);
            alignas(64) float used[kStrip];
            use(find_scores(tile, t, x), nullptr, kStrip, used);
            take_census(used, tile.experts[t], kStrip);
        }
}

// The common merge of as many strips as there are, up to a span, from `offset` on. Returns their elements: 0 where it is
// not so common.
template <typename Acc>
int merge_salient(Salient salient, const Merge<Acc>& m, int64_t offset, Waiting& waiting) {
    const Tile& tile = m.args.tile;
    const int64_t left = (tile.n - offset) / kStrip * kStrip;
    const int n = left < kSpan ? static_cast<int>(left) : kSpan;
    if (salient == nullptr || n == 0) return 0;
    const int nobody = salient(m.args, offset, n, m.stats.kept, waiting);
    if (nobody < 0) return 0;
    m.stats.unkept += nobody;
    take_censuses(tile, offset, n, m.x);
    return n;
}

// Undecided elements.

// Whether the result as it is stored is a number: the exponents of those that are not are all ones.
template <typename Stored>
bool is_stored_finite(const uint8_t* out, int64_t at, Stored exponent) {
    Stored bits;
    std::memcpy(&bits, out + sizeof(bits) * static_cast<uint64_t>(at), sizeof(bits));
    return (bits & exponent) != exponent;
}

bool is_stored_finite(const MergeArgs& args, int64_t at) {
    switch (args.out_dtype) {
        case DType::bf16: return is_stored_finite<uint16_t>(args.out, at, 0x7f80u);
        case DType::f16: return is_stored_finite<uint16_t>(args.out, at, 0x7c00u);
        case DType::f32: return is_stored_finite<uint32_t>(args.out, at, 0x7f800000u);
        default: return is_stored_finite<uint64_t>(args.out, at, 0x7ff0000000000000u);
    }
}

// What a merge keeps for its undecided elements: tiles of candidates, as they are and with closed brackets.
struct Resolver {
    Tile open, closed;
    int64_t index[kStrip];
    uint8_t merged[kStrip * sizeof(double)];
};

// What is known of each of at most kStrip undecided elements. brackets: how many hold its score; expert, step: whose it
// is where it is one, and how far it lies above the lowest; stays: a candidate, no alternative.
struct Undecided {
    alignas(64) int32_t brackets[kStrip] = {}, expert[kStrip] = {}, keepers[kStrip] = {}, usable[kStrip];
    alignas(64) int32_t kept[kStrip] = {};  // by somebody, as it was merged
    uint32_t step[kStrip] = {};
    int32_t stays[kStrip];
};

// The scores of candidates: x.edits[t] becomes them as they are counted, x.keep[t] whether the expert keeps the element
// as it was merged and counted.
template <typename Acc>
void look(const Tile& tile, bool bad, Strip<Acc>& x, Undecided& u) {
    std::memcpy(u.usable, x.ones, sizeof(u.usable));
    share_scores(tile, x);
    for (int t = 0; t < tile.n_experts; ++t) {
        const Expert& e = tile.experts[t];
        alignas(64) int32_t usable[kStrip];
        std::memcpy(usable, x.ones, sizeof(usable));
        if (bad) find_usable(tile, t, x, usable);
        if (tile.words.score != Score::spread) find_edits(tile, t, x);
        const float* s = find_scores(tile, t, x);
        select(tile, t, s, x);
        alignas(64) float used[kStrip];
        use(s, usable, x.n, used);
        std::memcpy(x.edits[t], used, sizeof(used));
        const uint32_t lowest = bit_cast<uint32_t>(e.threshold);
        for (int j = 0; j < x.n; ++j) {
            const uint32_t above = bit_cast<uint32_t>(used[j]) - lowest;
            const int32_t inside = above < e.span ? -1 : 0;
            u.brackets[j] -= inside;
            u.expert[j] = inside ? t : u.expert[j];
            u.step[j] = inside ? above : u.step[j];
            u.keepers[j] -= x.keep[t][j] & ~inside;
            u.usable[j] &= usable[j];
            u.kept[j] |= x.keep[t][j];
            if (tile.numbers.repair) x.keep[t][j] &= usable[j];
        }
    }
}

// The steps of candidate number j, whose scores are x.edits.
template <typename Acc>
void list_steps(const Tile& tile, int j, const Strip<Acc>& x, Candidates& c) {
    for (int t = 0; t < tile.n_experts; ++t) {
        const uint32_t step = bit_cast<uint32_t>(x.edits[t][j]) - bit_cast<uint32_t>(tile.experts[t].threshold);
        if (step < tile.experts[t].span) c.steps[t][c.n_steps[t]++] = step;
    }
}

// Counts m candidates from `from` on nowhere but in `reached`, and splits them: those that wait for one expert alone
// (nearly all) become its alternatives, a fifth of the size; the others stay.
template <typename Acc>
void resolve(const MergeArgs& args, int64_t from, int m, Strip<Acc>& x, Resolver& r, MergeStats& stats) {
    const Tile& tile = args.tile;
    Candidates& c = *args.candidates;
    point_at(tile, c, from, m, r.index, r.open);
    point_at(tile, c, from, m, r.index, r.closed);
    const MergeArgs without{r.closed, r.merged, args.out_dtype, nullptr};
    MergeStats found;
    go_to(r.open, 0, x);
    merge_strip(Merge<Acc>{without, found, x, false});
    bool bad = found.base.count > 0;
    for (int t = 0; t < tile.n_experts; ++t) bad |= found.weights[t].count + found.curvature[t].count > 0;
    const Acc limit = static_cast<Acc>(largest_finite(args.out_dtype));
    Undecided u;
    for (int j = 0; j < m; ++j) u.stays[j] = std::fabs(x.numerator[j]) <= limit && tile.n <= kFlag ? 0 : -1;
    look(r.open, bad, x, u);
    const int size = item_size(args.out_dtype);
    for (int j = 0; j < m; ++j) {
        const bool finite = is_stored_finite(args, c.index[from + j]);
        u.stays[j] |= u.brackets[j] != 1 || !u.usable[j] || !finite ? -1 : 0;
        stats.overflow -= finite ? 0 : 1;
        stats.unkept -= u.kept[j] ? 0 : 1;
        stats.repaired -= tile.numbers.repair && !u.usable[j] ? 1 : 0;
    }
    for (int t = 0; t < tile.n_experts; ++t) {
        int32_t taken = 0;
        for (int j = 0; j < m; ++j) taken -= (u.stays[j] | (u.expert[j] == t ? -1 : 0)) & x.keep[t][j];
        stats.kept[t] -= taken;
        stats.reached[t] += taken;
    }
    for (int j = 0; j < m; ++j) {
        if (u.stays[j]) {
            move(tile, c, from + j, c.count++);
            list_steps(tile, j, x, c);
            continue;
        }
        Alternatives& a = c.alternatives[u.expert[j]];
        a.index[a.count] = c.index[from + j] | (u.keepers[j] ? 0u : 1u << 31);
        a.steps[a.count] = u.step[j];
        std::memcpy(a.merged + size * a.count++, r.merged + size * j, static_cast<size_t>(size));
    }
}

template <typename Acc>
void resolve(const MergeArgs& args, Waiting& waiting, Strip<Acc>& x, Resolver& r, MergeStats& stats) {
    Candidates& c = *args.candidates;
    for (int first = 0; first < waiting.count; first += kStrip) {
        const int m = waiting.count - first < kStrip ? waiting.count - first : kStrip;
        const int64_t from = c.count;
        append(args.tile, waiting.at + first, m, c);
        c.count = from;  // those that stay move up
        resolve(args, from, m, x, r, stats);
    }
    waiting.count = 0;
}

template <typename Acc>
void merge_tile(const MergeArgs& args, MergeStats& stats) {
    const Tile& tile = args.tile;
    Strip<Acc> x;
    prepare(tile, x);
    const Ranked ranked(tile, 0, tile.n_experts, x);
    const bool open = args.candidates != nullptr && has_spans(tile);
    const Salient common = salient(args, open);
    const Merge<Acc> m{args, stats, x, open};
    Waiting waiting;
    Resolver* resolver = nullptr;
    if (open) {
        resolver = new Resolver{tile, tile, {}, {}};
        close_brackets(resolver->closed);
    }
    int64_t offset = 0, retry = 0;  // where the common merge is tried again
    while (offset < tile.n) {
        const int merged = offset >= retry ? merge_salient(common, m, offset, waiting) : 0;
        if (merged == 0) {
            if (offset >= retry) retry = offset + kSpan;
            go_to(tile, offset, x);
            merge_strip(m);
            if (open) waiting.add(x.waits, offset, x.n);
        }
        offset += merged > 0 ? merged : x.n;
        if (open && waiting.count >= Waiting::kMany) resolve(args, waiting, x, *resolver, stats);
    }
    if (open) resolve(args, waiting, x, *resolver, stats);
    delete resolver;
    for (int t = 0; t < tile.n_experts; ++t) stats.reached[t] += stats.kept[t];
}

}  // namespace

void merge(const MergeArgs& args, MergeStats& stats) {
    if (args.out_dtype == DType::f32 || args.out_dtype == DType::f64)
        merge_tile<double>(args, stats);
    else
        merge_tile<float>(args, stats);
}

}  // namespace OTA_ISA
}  // namespace ota
