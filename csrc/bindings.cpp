// The border between Python and the kernels: reads what Python hands over (arguments.hpp), releases the GIL, calls the
// kernel of the chosen instruction set.

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>

#include "arguments.hpp"
#include "lost.hpp"
#include "pack.hpp"
#include "pack_arguments.hpp"
#include "places.hpp"

using namespace nb::literals;

namespace {

const ota::Kernels& kernels(const std::string& isa) {
#if defined(OTA_X86_64)
    if (isa == "v4") return ota::v4::kernels;
    if (isa == "v3") return ota::v3::kernels;
#endif
    require(isa == "base", "unknown instruction set");
    return ota::base::kernels;
}

// Instruction sets this machine runs, widest first.
std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
#if defined(OTA_X86_64)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512cd");
    if (v4) names.emplace_back("v4");
    if (v3) names.emplace_back("v3");
#endif
    names.emplace_back("base");
    return names;
}

// What a merge counted, and how many elements it put into the lists of candidates.
struct Merged {
    std::vector<int64_t> kept, reached;
    int64_t unkept, overflow, repaired;
    ota::NonFinite base;
    std::vector<ota::NonFinite> weights, curvatures;
    int64_t candidates;
    std::vector<int64_t> steps, alternatives;
    std::pair<int, int64_t> damaged;  // an expert whose pack has a tile that is none, -1 without one; the tile
};

// Sums that a merge goes on with; see sums.py.
ota::Sums sums_of(nb::handle given, int64_t n, ota::DType type) {
    const int64_t bytes = n * (ota::item_size(type) == 2 ? 4 : 8);
    const auto right = [&](const auto& plane) { return static_cast<int64_t>(plane.size()) == bytes; };
    const auto numerator = array<OutBytes>(given.attr("new_numerator"), "sums are bytes");
    const auto denominator = array<OutBytes>(given.attr("new_denominator"), "sums are bytes");
    require(right(numerator) && right(denominator), "sums of n elements");
    ota::Sums sums;
    sums.new_numerator = numerator.data(), sums.new_denominator = denominator.data();
    sums.removes = number<bool>(given, "removes");
    if (given.attr("numerator").is_none()) return sums;
    const auto before = array<Bytes>(given.attr("numerator"), "sums are bytes");
    const auto weights = array<Bytes>(given.attr("denominator"), "sums are bytes");
    require(right(before) && right(weights), "sums of n elements");
    sums.numerator = before.data(), sums.denominator = weights.data();
    return sums;
}

// censuses: an array or none for each expert; lists: none where no threshold is a bracket; sums: none where the merge
// does not go on.
Merged merge(nb::handle inputs, nb::handle terms, OutBytes out, const nb::list& censuses, nb::handle lists,
             nb::handle sums, const std::string& isa) {
    const auto tile = read(inputs, terms, true);
    const ota::DType type = dtype(inputs.attr("out_dtype"));
    require(static_cast<int>(type) <= 3, "a merged tensor is float32, bfloat16, float16 or float64");
    require(static_cast<int64_t>(out.size()) == tile->n * ota::item_size(type), "the output has not n elements");
    require(static_cast<int>(nb::len(censuses)) == tile->n_experts, "a census, or none, for each expert");
    for (int t = 0; t < tile->n_experts; ++t) {
        if (nb::object(censuses[t]).is_none()) continue;
        const auto census = array<OutInts>(censuses[t], "a census is int64");
        require(census.size() == ota::kCensus, "a census has 513 numbers");
        tile->experts[t].census = census.data();
    }
    ota::Candidates undecided;
    if (!lists.is_none()) undecided = candidates(lists, *tile, type);
    const ota::Sums going_on = sums.is_none() ? ota::Sums{} : sums_of(sums, tile->n, type);
    const ota::MergeArgs args{*tile, out.data(), type, lists.is_none() ? nullptr : &undecided, going_on};
    const ota::Kernels& table = kernels(isa);
    ota::MergeStats stats;
    {
        nb::gil_scoped_release release;
        table.merge(args, stats);
    }
    const auto of_experts = [&](const auto* values) { return std::vector(values, values + tile->n_experts); };
    Merged found{of_experts(stats.kept), of_experts(stats.reached), stats.unkept, stats.overflow, stats.repaired,
                 stats.base, of_experts(stats.weights), of_experts(stats.curvature), undecided.count,
                 of_experts(undecided.n_steps), {}, {stats.damaged, stats.damaged_tile}};
    for (int t = 0; t < tile->n_experts; ++t) found.alternatives.push_back(undecided.alternatives[t].count);
    return found;
}

void check_expert(const ota::Tile& tile, int t) { require(t >= 0 && t < tile.n_experts, "no such expert"); }

ota::SurveyStats histogram(nb::handle inputs, int t, nb::handle terms, bool of_edits, int64_t prefix, OutInts counts,
                           OutInts lows, const std::string& isa) {
    require(counts.size() == ota::kBins && lows.size() == ota::kBins, "a histogram has 65536 bins");
    const auto tile = read(inputs, terms);
    check_expert(*tile, t);
    const ota::Kernels& table = kernels(isa);
    ota::SurveyStats stats;
    nb::gil_scoped_release release;
    table.histogram(*tile, t, of_edits, prefix, counts.data(), lows.data(), stats);
    return stats;
}

using PerElement = void (*ota::Kernels::*)(const ota::Tile&, int, float*, ota::SurveyStats&);

template <PerElement Kernel>
ota::SurveyStats per_element(nb::handle inputs, int t, nb::handle terms, OutFloats out, const std::string& isa) {
    const auto tile = read(inputs, terms);
    check_expert(*tile, t);
    require(static_cast<int64_t>(out.size()) == tile->n, "the output has not n elements");
    const ota::Kernels& table = kernels(isa);
    ota::SurveyStats stats;
    nb::gil_scoped_release release;
    (table.*Kernel)(*tile, t, out.data(), stats);
    return stats;
}

// Intervals: (lowest, highest, room). How many scores are not 0, how many are inside of each interval, and what inputs are not
// finite.
std::tuple<int64_t, std::vector<int64_t>, ota::SurveyStats> around(nb::handle inputs, int t, nb::handle terms,
                                                                   const nb::list& intervals, OutInts counts,
                                                                   const std::string& isa) {
    const auto tile = read(inputs, terms);
    check_expert(*tile, t);
    const auto n = static_cast<int>(nb::len(intervals));
    require(n <= ota::kMaxIntervals, "so many intervals");
    const int64_t pieces = (tile->n + ota::kCounted - 1) / ota::kCounted;
    require(static_cast<int64_t>(counts.size()) == pieces * n * ota::kAround, "room for the counts, no more");
    std::vector<ota::Interval> of;
    for (const nb::handle one : intervals) {
        const auto values = nb::cast<nb::tuple>(one);
        const auto room = array<OutFloats>(values[2], "scores are float32");
        require(static_cast<int64_t>(room.size()) >= tile->n + ota::kSpare, "room for all scores and SPARE more");
        of.push_back({nb::cast<float>(values[0]), nb::cast<float>(values[1]), room.data()});
    }
    const std::vector<ota::Interval> before = of;
    const ota::Kernels& table = kernels(isa);
    ota::SurveyStats stats;
    int64_t nonzero = 0;
    {
        nb::gil_scoped_release release;
        std::fill_n(counts.data(), counts.size(), 0);
        nonzero = table.around(*tile, t, of.data(), n, counts.data(), stats);
    }
    std::vector<int64_t> inside;
    for (size_t k = 0; k < of.size(); ++k) inside.push_back(of[k].inside - before[k].inside);
    return {nonzero, inside, stats};
}

// The scores of experts at runs of `length` of the tile's elements: one array per expert. place: (fd, offset) of a
// buffer, or none: all are read in memory. None, or the buffer that is in a file that could not be read.
nb::object run_scores(nb::handle inputs, nb::handle terms, const std::vector<int>& experts, const Ints& starts,
                      int length, const nb::list& outs, nb::handle place, int together, const std::string& isa) {
    const auto tile = read(inputs, terms);
    ota::RunArgs args;
    args.starts = starts.data(), args.count = static_cast<int64_t>(starts.size());
    args.length = length, args.together = together;
    args.experts = experts.data(), args.n_experts = static_cast<int>(experts.size());
    require(length > 0 && together > 0 && int64_t{length} * together <= 1024, "runs of 1 to 1024 elements together");
    require(args.count % together == 0, "whole clusters of runs");
    require(!experts.empty() && nb::len(outs) == experts.size(), "one array for each expert");
    std::vector<float*> out;
    for (size_t i = 0; i < experts.size(); ++i) {
        check_expert(*tile, experts[i]);
        const auto scores = array<OutFloats>(outs[i], "scores are float32");
        require(static_cast<int64_t>(scores.size()) == args.count * length, "room for the scores, no more");
        out.push_back(scores.data());
    }
    require(tile->words.select != ota::Select::random_by_rank || place.is_none(), "runs have no whole rows");
    const auto buffer = [&](ota::Unread::Role role, int t) -> nb::object {
        if (role == ota::Unread::Role::base) return inputs.attr("base");
        if (role == ota::Unread::Role::weights) return inputs.attr("experts")[t];
        if (role == ota::Unread::Role::origin) return inputs.attr("origins")[t];
        const nb::object buffers = inputs.attr("curvatures")[t].attr("buffers");
        return nb::len(buffers) > 0 ? nb::object(buffers[0]) : nb::none();
    };
    if (!place.is_none()) {
        using Role = ota::Unread::Role;
        const auto look_up = [&](Role role, int t) {
            const nb::object of = buffer(role, t);
            if (of.is_none()) return ota::FilePlace{};
            const auto [fd, offset] = nb::cast<std::pair<int, int64_t>>(place(of));
            require(fd < 0 || offset >= 0, "a place in the file");
            return ota::FilePlace{fd, offset};
        };
        args.base = look_up(Role::base, -1);
        for (int t = 0; t < tile->n_experts; ++t) {
            const bool wanted = std::find(experts.begin(), experts.end(), t) != experts.end();
            if (!wanted && tile->words.score != ota::Score::spread) continue;
            args.weights[t] = look_up(Role::weights, t), args.curvature[t] = look_up(Role::curvature, t);
            if (tile->experts[t].origin.data) args.origins[t] = look_up(Role::origin, t);
        }
    }
    const ota::Kernels& table = kernels(isa);
    ota::Unread unread;
    {
        nb::gil_scoped_release release;
        for (int64_t i = 0; i < args.count; ++i)
            require(args.starts[i] >= 0 && args.starts[i] + length <= tile->n, "a run outside");
        unread = table.run_scores(*tile, args, out.data());
    }
    return unread.role == ota::Unread::Role::none ? nb::none() : buffer(unread.role, unread.expert);
}

using Count = std::pair<int64_t, int64_t>;

// m elements of `size` bytes for positions in `bytes` bytes.
void check_elements(const Positions& positions, const Bytes& elements, int size, int64_t bytes) {
    const auto m = static_cast<int64_t>(positions.size());
    require(size == 2 || size == 4 || size == 8, "elements of 2, 4 or 8 bytes");
    require(static_cast<int64_t>(elements.size()) == m * size, "as many elements as positions");
    uint32_t last = 0;
    for (int64_t j = 0; j < m; ++j) last = std::max(last, positions.data()[j]);
    require(m == 0 || last < bytes / size, "a position outside");
}

// data[positions] = elements, of `size` bytes each.
void scatter(OutBytes data, const Positions& positions, const Bytes& elements, int size) {
    nb::gil_scoped_release release;
    check_elements(positions, elements, size, static_cast<int64_t>(data.size()));
    ota::scatter(data.data(), positions.data(), static_cast<int64_t>(positions.size()), elements.data(), size);
}

// The same in n elements of a file, from byte `begin` on. False where they are to be read and written instead.
bool scatter_in_file(int fd, int64_t begin, int64_t n, const Positions& positions, const Bytes& elements,
                     int size) {
    nb::gil_scoped_release release;
    check_elements(positions, elements, size, n * size);
    return ota::scatter_in_file(fd, begin, n * size, positions.data(), static_cast<int64_t>(positions.size()),
                                elements.data(), size);
}

// Of alternatives (positions, steps, values of `size` bytes, limit) of some experts, those whose steps are below
// the limit: their positions and values go to `at` and `values`, room for all. How many of each, and how many of
// these no expert keeps.
std::vector<Count> below(const nb::list& alternatives, int size, OutPositions at, OutBytes values) {
    require(size == 2 || size == 4 || size == 8, "values of 2, 4 or 8 bytes");
    std::vector<ota::Below> lists;
    int64_t total = 0;
    for (const nb::handle entry : alternatives) {
        const auto one = nb::cast<nb::tuple>(entry);
        const auto positions = nb::cast<Positions>(one[0]), steps = nb::cast<Positions>(one[1]);
        const auto merged = nb::cast<Bytes>(one[2]);
        const auto m = static_cast<int64_t>(positions.size());
        require(steps.size() == positions.size(), "one step each");
        require(static_cast<int64_t>(merged.size()) == m * size, "one value each");
        lists.push_back({m, positions.data(), steps.data(), merged.data(), nb::cast<uint32_t>(one[3])});
        total += m;
    }
    require(static_cast<int64_t>(at.size()) >= total && static_cast<int64_t>(values.size()) >= total * size,
            "room for all");
    std::vector<Count> found;
    nb::gil_scoped_release release;
    int64_t n = 0;
    for (const ota::Below& list : lists) {
        int64_t alone = 0;
        const int64_t some = ota::below(list, size, at.data() + n, values.data() + n * size, alone);
        found.emplace_back(some, alone);
        n += some;
    }
    return found;
}

// Values from low to below high, to `out`: (how many, how many are at least high).
std::pair<int64_t, int64_t> between(const Floats& values, float low, float high, OutFloats out,
                                    const std::string& isa) {
    const auto n = static_cast<int64_t>(values.size());
    require(static_cast<int64_t>(out.size()) >= n + ota::kSpare, "room for all values and SPARE more");
    const ota::Kernels& table = kernels(isa);
    nb::gil_scoped_release release;
    const ota::Between found = table.between(values.data(), n, low, high, out.data());
    return {found.inside, found.above};
}

// Of values[rows, ...]; see kernels.hpp.
int64_t squared_differences(const Floats& values, int64_t rows, float least, const std::string& isa) {
    const auto n = static_cast<int64_t>(values.size());
    require(rows == 0 ? n == 0 : rows > 0 && n % rows == 0, "whole rows");
    const ota::Kernels& table = kernels(isa);
    nb::gil_scoped_release release;
    return rows == 0 ? 0 : table.squared_differences(values.data(), rows, n / rows, least);
}

// Runs of `run_bytes` bytes that begin at `starts` (bytes), copied one after the other.
void copy_runs(const Bytes& data, const Ints& starts, OutBytes out, int64_t run_bytes) {
    const auto count = static_cast<int64_t>(starts.size()), size = static_cast<int64_t>(data.size());
    require(static_cast<int64_t>(out.size()) == count * run_bytes, "room for the runs, no more");
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < count; ++i)
        require(starts.data()[i] >= 0 && starts.data()[i] + run_bytes <= size, "a run outside");
    ota::copy_runs(data.data(), 1, starts.data(), count, count, run_bytes, out.data());
}

// Has windows of `together` runs read from the disk, without waiting for them.
void ask_for_runs(int fd, const Ints& starts, int64_t run_bytes, int64_t together) {
    const auto count = static_cast<int64_t>(starts.size());
    require(together > 0 && count % together == 0, "whole clusters of runs");
    nb::gil_scoped_release release;
    ota::ask_for_runs(fd, starts.data(), count, run_bytes, together);
}

std::pair<double, ota::NonFinite> power_sum(nb::handle given, int64_t n, double power, const std::string& isa) {
    const ota::Curvature c = curvature(given, n);
    const ota::Kernels& table = kernels(isa);
    ota::NonFinite bad;
    nb::gil_scoped_release release;
    const double sum = table.power_sum(c, n, power, bad);
    return {sum, bad};
}

ota::NonFinite row_column_sums(nb::handle given, OutDoubles row_sums, OutDoubles column_sums, const std::string& isa) {
    const auto rows = static_cast<int64_t>(row_sums.size()), columns = static_cast<int64_t>(column_sums.size());
    const ota::Curvature v = curvature(given, rows * columns);
    const ota::Kernels& table = kernels(isa);
    ota::NonFinite bad;
    nb::gil_scoped_release release;
    table.row_column_sums(v, rows, columns, row_sums.data(), column_sums.data(), bad);
    return bad;
}

// Inputs without terms: their edits are all that is read.
std::unique_ptr<ota::Tile> read_edits(nb::handle inputs, bool whole_rows) {
    auto tile = std::make_unique<ota::Tile>();
    read_inputs(inputs, *tile);
    const bool whole = tile->index == nullptr && tile->start % tile->columns == 0 && tile->n % tile->columns == 0;
    require(whole || !whole_rows, "a tile of whole rows");
    return tile;
}

// by: a place in (tensor, row, column).
void gram(nb::handle inputs, int by, OutDoubles out, const std::string& isa) {
    const auto tile = read_edits(inputs, by != 0);
    const int64_t groups = by == 0 ? 1 : by == 1 ? tile->n / tile->columns : tile->columns;
    const int64_t pairs = int64_t{tile->n_experts} * tile->n_experts;
    require(static_cast<int64_t>(out.size()) == groups * pairs, "room for the products, no more");
    const ota::Kernels& table = kernels(isa);
    nb::gil_scoped_release release;
    table.gram(*tile, static_cast<ota::By>(by), out.data());
}

std::vector<ota::MaskedSums> masked_sums(nb::handle inputs, nb::handle terms, const std::string& isa) {
    const auto tile = read(inputs, terms);
    const ota::Kernels& table = kernels(isa);
    std::vector<ota::MaskedSums> sums(static_cast<size_t>(tile->n_experts));
    nb::gil_scoped_release release;
    table.masked_sums(*tile, sums.data());
    return sums;
}

void row_divergence(nb::handle inputs, int t, OutDoubles out, const std::string& isa) {
    const auto tile = read_edits(inputs, true);
    check_expert(*tile, t);
    require(tile->origin(t).data != nullptr, "a base, or an origin of the expert");
    require(static_cast<int64_t>(out.size()) == tile->n / tile->columns, "room for a number per row");
    const ota::Kernels& table = kernels(isa);
    nb::gil_scoped_release release;
    table.row_divergence(*tile, t, out.data());
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels. Use ota_kernels.backends.native; these entry points take raw tiles.";
    m.attr("SPARE") = ota::kSpare;
    m.attr("COUNTED") = ota::kCounted;
    nb::class_<ota::NonFinite>(m, "NonFinite")
        .def_ro("count", &ota::NonFinite::count)
        .def_ro("first", &ota::NonFinite::first);
    nb::class_<ota::SurveyStats>(m, "SurveyStats")
        .def_ro("base", &ota::SurveyStats::base)
        .def_ro("weights", &ota::SurveyStats::weights)
        .def_ro("curvature", &ota::SurveyStats::curvature);
    nb::class_<ota::MaskedSums>(m, "MaskedSums")
        .def_ro("kept", &ota::MaskedSums::kept)
        .def_ro("l1", &ota::MaskedSums::l1)
        .def_ro("kept_l1", &ota::MaskedSums::kept_l1)
        .def_ro("kept_squares", &ota::MaskedSums::kept_squares)
        .def_ro("shared", &ota::MaskedSums::shared)
        .def_ro("unique", &ota::MaskedSums::unique);
    nb::class_<Merged>(m, "Merged")
        .def_ro("kept", &Merged::kept)
        .def_ro("reached", &Merged::reached)
        .def_ro("unkept", &Merged::unkept)
        .def_ro("overflow", &Merged::overflow)
        .def_ro("repaired", &Merged::repaired)
        .def_ro("base", &Merged::base)
        .def_ro("weights", &Merged::weights)
        .def_ro("curvatures", &Merged::curvatures)
        .def_ro("candidates", &Merged::candidates)
        .def_ro("steps", &Merged::steps)
        .def_ro("alternatives", &Merged::alternatives)
        .def_ro("damaged", &Merged::damaged);
    bind_packs(m);
    m.def("instruction_sets", &instruction_sets);
    m.def("merge", &merge, "tile"_a, "terms"_a, "out"_a, "censuses"_a, "lists"_a.none(), "sums"_a.none(), "isa"_a);
    m.def("histogram", &histogram, "tile"_a, "t"_a, "terms"_a, "of_edits"_a, "prefix"_a, "counts"_a, "lows"_a, "isa"_a);
    m.def("edits", &per_element<&ota::Kernels::edits>, "tile"_a, "t"_a, "terms"_a, "out"_a, "isa"_a);
    m.def("scores", &per_element<&ota::Kernels::scores>, "tile"_a, "t"_a, "terms"_a, "out"_a, "isa"_a);
    m.def("around", &around, "tile"_a, "t"_a, "terms"_a, "intervals"_a, "counts"_a, "isa"_a);
    m.def("run_scores", &run_scores, "tile"_a, "terms"_a, "experts"_a, "starts"_a, "length"_a, "outs"_a,
          "place"_a.none(), "together"_a, "isa"_a);
    m.def("scatter", &scatter, "data"_a, "positions"_a, "elements"_a, "size"_a);
    m.def("is_in_memory", &ota::is_in_memory, "fd"_a);
    m.def("guard", &ota::guard, "address"_a, "nbytes"_a);
    m.def("unguard", &ota::unguard, "number"_a);
    m.def("watch", &ota::watch, "on"_a);
    m.def("lost", &ota::lost);
    m.def("end_where_lost", &ota::end_where_lost);
    m.def("scatter_in_file", &scatter_in_file, "fd"_a, "begin"_a, "n"_a, "positions"_a, "elements"_a, "size"_a);
    m.def("below", &below, "alternatives"_a, "size"_a, "at"_a, "values"_a);
    m.def("between", &between, "values"_a, "low"_a, "high"_a, "out"_a, "isa"_a);
    m.def("squared_differences", &squared_differences, "values"_a, "rows"_a, "least"_a, "isa"_a);
    m.def("copy_runs", &copy_runs, "data"_a, "starts"_a, "out"_a, "run_bytes"_a);
    m.def("ask_for_runs", &ask_for_runs, "fd"_a, "starts"_a, "run_bytes"_a, "together"_a);
    m.def("power_sum", &power_sum, "curvature"_a, "n"_a, "power"_a, "isa"_a);
    m.def("row_column_sums", &row_column_sums, "curvature"_a, "row_sums"_a, "column_sums"_a, "isa"_a);
    m.def("gram", &gram, "tile"_a, "by"_a, "out"_a, "isa"_a);
    m.def("masked_sums", &masked_sums, "tile"_a, "terms"_a, "isa"_a);
    m.def("row_divergence", &row_divergence, "tile"_a, "t"_a, "out"_a, "isa"_a);
}
