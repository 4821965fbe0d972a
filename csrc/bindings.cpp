// The border between Python and the kernels: checks sizes and codes once, releases the GIL, calls the kernel
// of the chosen instruction set. Every array is flat; tensors arrive as their bytes (uint8).

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "files.hpp"
#include "kernels.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutDoubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Positions = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutPositions = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutInts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

int item_size(int code) {
    switch (static_cast<ota::DType>(code)) {
        case ota::DType::f32: return 4;
        case ota::DType::bf16:
        case ota::DType::f16: return 2;
        case ota::DType::f64: return 8;
        case ota::DType::f8_e4m3:
        case ota::DType::f8_e5m2: return 1;
    }
    throw std::invalid_argument("unknown element type code");
}

ota::Operand operand(const Bytes& data, int code, int64_t n) {
    require(static_cast<int64_t>(data.size()) == n * item_size(code), "an input has not n elements");
    return {data.data(), static_cast<ota::DType>(code)};
}

ota::Curvature log8(const nb::tuple& spec, int64_t n) {
    ota::Curvature c;
    c.kind = ota::CurvatureKind::log8;
    const auto codes = nb::cast<Bytes>(spec[0]);
    const auto scales = nb::cast<Floats>(spec[1]);
    c.n_columns = nb::cast<int64_t>(spec[2]);
    c.start = nb::cast<int64_t>(spec[3]);
    require(static_cast<int64_t>(codes.size()) == n, "as many codes as elements");
    require((c.n_columns > 0 || n == 0) && c.start >= 0, "rows of no columns");
    require(static_cast<int64_t>(scales.size()) * c.n_columns >= c.start + n, "scales that end before the tile");
    c.codes = codes.data();
    c.rows = scales.data();
    return c;
}

// () uniform; (bytes, code) full; (codes, scales, n_columns, start) log8; (rows, columns, n_columns, rank, start,
// low_rank) rank-1 and low rank. low_rank tells the last two apart: its values are clamped at 0.
ota::Curvature curvature(const nb::tuple& spec, int64_t n) {
    ota::Curvature c;
    if (spec.size() == 0) return c;
    if (spec.size() == 2) {
        c.kind = ota::CurvatureKind::full;
        c.values = operand(nb::cast<Bytes>(spec[0]), nb::cast<int>(spec[1]), n);
        return c;
    }
    if (spec.size() == 4) return log8(spec, n);
    require(spec.size() == 6, "a curvature has 0, 2, 4 or 6 parts");
    const auto rows = nb::cast<Floats>(spec[0]), columns = nb::cast<Floats>(spec[1]);
    c.n_columns = nb::cast<int64_t>(spec[2]);
    c.rank = nb::cast<int64_t>(spec[3]);
    c.start = nb::cast<int64_t>(spec[4]);
    c.kind = nb::cast<bool>(spec[5]) ? ota::CurvatureKind::low_rank : ota::CurvatureKind::rank1;
    require((c.n_columns > 0 || n == 0) && c.rank > 0 && c.start >= 0, "factors of no columns or no rank");
    require(static_cast<int64_t>(columns.size()) == c.rank * c.n_columns, "column factors of the wrong size");
    require(static_cast<int64_t>(rows.size()) / c.rank * c.n_columns >= c.start + n,
            "row factors that end before the tile");
    c.rows = rows.data();
    c.columns = columns.data();
    return c;
}

// (bytes, code, curvature, threshold, score_scale, weight_scale, edit_scale, trim, span, census)
ota::Expert expert(const nb::tuple& spec, int64_t n) {
    require(spec.size() == 10, "an expert has 10 parts");
    ota::Expert e;
    e.weights = operand(nb::cast<Bytes>(spec[0]), nb::cast<int>(spec[1]), n);
    e.curvature = curvature(nb::cast<nb::tuple>(spec[2]), n);
    e.threshold = static_cast<float>(nb::cast<double>(spec[3]));
    e.score_scale = static_cast<float>(nb::cast<double>(spec[4]));
    e.weight_scale = nb::cast<double>(spec[5]);
    e.edit_scale = nb::cast<double>(spec[6]);
    e.trim = static_cast<float>(nb::cast<double>(spec[7]));
    e.span = nb::cast<uint32_t>(spec[8]);
    if (!spec[9].is_none()) {
        const auto census = nb::cast<OutInts>(spec[9]);
        require(census.size() == ota::kCensus, "a census has 513 numbers");
        e.census = census.data();
    }
    return e;
}

// (power, epsilon, lambda, denominator, curvature_weights, masked, mask_weights, elect_signs,
//  fallback_to_base, repair_nonfinite)
ota::Formula formula(const nb::tuple& spec) {
    require(spec.size() == 10, "a formula has 10 parts");
    ota::Formula f;
    f.power = nb::cast<double>(spec[0]);
    f.epsilon = nb::cast<double>(spec[1]);
    f.lambda = nb::cast<double>(spec[2]);
    f.denominator = nb::cast<double>(spec[3]);
    f.curvature_weights = nb::cast<bool>(spec[4]);
    f.masked = nb::cast<bool>(spec[5]);
    f.mask_weights = nb::cast<bool>(spec[6]);
    f.elect_signs = nb::cast<bool>(spec[7]);
    f.fallback_to_base = nb::cast<bool>(spec[8]);
    f.repair_nonfinite = nb::cast<bool>(spec[9]);
    return f;
}

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

using Count = std::pair<int64_t, int64_t>;  // how many, first index in the tile or -1

Count pair(const ota::NonFinite& bad) { return {bad.count, bad.first}; }

// (index, base, [weights], [curvature], [steps], [indices, steps and merged values of alternatives]): room for
// every element of the tile and kSpare more; empty where not wanted.
ota::Candidates candidates(const nb::tuple& spec, const ota::MergeArgs& args) {
    require(spec.size() == 8, "candidates have 8 parts");
    const auto room = [&](const OutBytes& a, int size) {
        require(static_cast<int64_t>(a.size()) >= size * (args.n + ota::kSpare), "too little room for candidates");
        return a.data();
    };
    ota::Candidates c;
    c.index = reinterpret_cast<uint32_t*>(room(nb::cast<OutBytes>(spec[0]), 4));
    if (args.has_base) c.base = room(nb::cast<OutBytes>(spec[1]), item_size(static_cast<int>(args.base.dtype)));
    const auto part = [&](int i) {
        const auto of_experts = nb::cast<nb::list>(spec[i]);
        require(static_cast<int>(of_experts.size()) == args.n_experts, "candidates of another number of experts");
        return of_experts;
    };
    const nb::list weights = part(2), curvature = part(3), steps = part(4);
    const nb::list indices = part(5), single_steps = part(6), merged = part(7);
    for (int t = 0; t < args.n_experts; ++t) {
        const ota::Expert& e = args.experts[t];
        c.weights[t] = room(nb::cast<OutBytes>(weights[t]), item_size(static_cast<int>(e.weights.dtype)));
        if (e.curvature.kind != ota::CurvatureKind::uniform)
            c.curvature[t] = reinterpret_cast<float*>(room(nb::cast<OutBytes>(curvature[t]), 4));
        if (e.span == 0) continue;
        c.steps[t] = reinterpret_cast<uint32_t*>(room(nb::cast<OutBytes>(steps[t]), 4));
        ota::Alternatives& a = c.alternatives[t];
        a.index = reinterpret_cast<uint32_t*>(room(nb::cast<OutBytes>(indices[t]), 4));
        a.steps = reinterpret_cast<uint32_t*>(room(nb::cast<OutBytes>(single_steps[t]), 4));
        a.merged = room(nb::cast<OutBytes>(merged[t]), item_size(static_cast<int>(args.out_dtype)));
    }
    return c;
}

nb::tuple merge(const std::optional<Bytes>& base, int base_code, const nb::list& experts,
                const nb::tuple& formula_spec, OutBytes out, int out_code,
                const std::optional<nb::tuple>& candidates_spec, const std::string& isa) {
    require(out_code >= 0 && out_code <= 3, "a merged tensor is float32, bfloat16, float16 or float64");
    ota::MergeArgs args;
    args.n = static_cast<int64_t>(out.size()) / item_size(out_code);
    require(static_cast<int64_t>(out.size()) == args.n * item_size(out_code), "the output is cut short");
    args.n_experts = static_cast<int>(experts.size());
    require(args.n_experts >= 1 && args.n_experts <= ota::kMaxExperts, "1 to 64 experts can be merged");
    args.has_base = base.has_value();
    if (base) args.base = operand(*base, base_code, args.n);
    for (int t = 0; t < args.n_experts; ++t) args.experts[t] = expert(nb::cast<nb::tuple>(experts[t]), args.n);
    args.formula = formula(formula_spec);
    args.out = out.data();
    args.out_dtype = static_cast<ota::DType>(out_code);
    ota::Candidates undecided;
    if (candidates_spec) {
        undecided = candidates(*candidates_spec, args);
        args.candidates = &undecided;
    }

    const ota::Kernels& table = kernels(isa);
    ota::MergeStats stats;
    {
        nb::gil_scoped_release release;
        table.merge(args, stats);
    }
    const std::vector<int64_t> kept(stats.kept, stats.kept + args.n_experts);
    const std::vector<int64_t> reached(stats.reached, stats.reached + args.n_experts);
    const std::vector<int64_t> n_steps(undecided.n_steps, undecided.n_steps + args.n_experts);
    std::vector<int64_t> n_alternatives;
    std::vector<Count> weights, curvatures;
    for (int t = 0; t < args.n_experts; ++t) {
        n_alternatives.push_back(undecided.alternatives[t].count);
        weights.push_back(pair(stats.weights[t]));
        curvatures.push_back(pair(stats.curvature[t]));
    }
    return nb::make_tuple(kept, reached, stats.unkept, stats.overflow, stats.repaired, pair(stats.base), weights,
                          curvatures, undecided.count, n_steps, n_alternatives);
}

ota::SurveyArgs survey_args(const std::optional<Bytes>& base, int base_code, const nb::tuple& expert_spec,
                            int64_t n) {
    ota::SurveyArgs args;
    args.n = n;
    args.has_base = base.has_value();
    if (base) args.base = operand(*base, base_code, n);
    args.expert = expert(expert_spec, n);
    return args;
}

std::vector<Count> counts_of(const ota::SurveyStats& stats) {
    return {pair(stats.base), pair(stats.weights), pair(stats.curvature)};
}

std::vector<Count> histogram(const std::optional<Bytes>& base, int base_code, const nb::tuple& expert_spec,
                             int64_t n, bool of_edits, int64_t prefix, OutInts counts, OutInts lows,
                             const std::string& isa) {
    require(counts.size() == ota::kBins && lows.size() == ota::kBins, "a histogram has 65536 bins");
    ota::SurveyArgs args = survey_args(base, base_code, expert_spec, n);
    args.score = of_edits ? ota::Score::edit : ota::Score::saliency;
    const ota::Kernels& table = kernels(isa);
    ota::SurveyStats stats;
    {
        nb::gil_scoped_release release;
        table.histogram(args, prefix, counts.data(), lows.data(), stats);
    }
    return counts_of(stats);
}

using PerElement = void (*ota::Kernels::*)(const ota::SurveyArgs&, float*, ota::SurveyStats&);

template <PerElement Kernel>
std::vector<Count> per_element(const std::optional<Bytes>& base, int base_code, const nb::tuple& expert_spec,
                               OutFloats out, const std::string& isa) {
    const ota::SurveyArgs args = survey_args(base, base_code, expert_spec, static_cast<int64_t>(out.size()));
    const ota::Kernels& table = kernels(isa);
    ota::SurveyStats stats;
    {
        nb::gil_scoped_release release;
        (table.*Kernel)(args, out.data(), stats);
    }
    return counts_of(stats);
}

// The scores of experts at runs of `length` of the tile's n elements: one array per expert. places: (fd, offset) of
// the base, then of each expert's weights and curvature; none: all are read in memory. -1, or which of them is in a
// file that could not be read.
int run_scores(const std::optional<Bytes>& base, int base_code, const nb::list& experts, int64_t n, const Ints& starts,
               int length, const nb::list& outs, const std::optional<nb::list>& places, int together,
               const std::string& isa) {
    const size_t n_experts = nb::len(experts);
    ota::RunArgs args;
    args.starts = starts.data(), args.count = static_cast<int64_t>(starts.size());
    args.length = length, args.together = together, args.n_experts = static_cast<int>(n_experts);
    require(length > 0 && together > 0 && int64_t{length} * together <= 1024,  // a block
            "runs of 1 to 1024 elements together");
    require(args.count % together == 0, "whole clusters of runs");
    require(n_experts > 0 && n_experts <= ota::kMaxExperts && nb::len(outs) == n_experts, "one array for each expert");
    std::vector<ota::SurveyArgs> of_experts;
    std::vector<float*> out;
    for (const nb::handle spec : experts)
        of_experts.push_back(survey_args(base, base_code, nb::cast<nb::tuple>(spec), n));
    args.of_experts = of_experts.data();
    for (const nb::handle one : outs) {
        const auto scores = nb::cast<OutFloats>(one, false);  // no copy: it would be lost
        require(static_cast<int64_t>(scores.size()) == args.count * length, "room for the scores, no more");
        out.push_back(scores.data());
    }
    if (places) {
        require(nb::len(*places) == 1 + 2 * n_experts, "a place for each input");
        const auto place = [&](size_t i) {
            const auto [fd, offset] = nb::cast<std::pair<int, int64_t>>((*places)[i]);
            require(fd < 0 || offset >= 0, "a place in the file");
            return ota::FilePlace{fd, offset};
        };
        args.base = place(0);
        for (size_t t = 0; t < n_experts; ++t)
            args.weights[t] = place(1 + 2 * t), args.curvature[t] = place(2 + 2 * t);
    }
    const ota::Kernels& table = kernels(isa);
    nb::gil_scoped_release release;
    for (int64_t i = 0; i < args.count; ++i)
        require(args.starts[i] >= 0 && args.starts[i] + length <= n, "a run outside");
    return table.run_scores(args, out.data());
}

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

nb::tuple power_sum(const nb::tuple& curvature_spec, int64_t n, double power, const std::string& isa) {
    const ota::Curvature c = curvature(curvature_spec, n);
    const ota::Kernels& table = kernels(isa);
    ota::NonFinite bad;
    double sum = 0;
    {
        nb::gil_scoped_release release;
        sum = table.power_sum(c, n, power, bad);
    }
    return nb::make_tuple(sum, pair(bad));
}

Count row_column_sums(const nb::tuple& curvature_spec, OutDoubles row_sums, OutDoubles column_sums,
                      const std::string& isa) {
    const auto rows = static_cast<int64_t>(row_sums.size()), columns = static_cast<int64_t>(column_sums.size());
    const ota::Curvature v = curvature(curvature_spec, rows * columns);
    const ota::Kernels& table = kernels(isa);
    ota::NonFinite bad;
    {
        nb::gil_scoped_release release;
        table.row_column_sums(v, rows, columns, row_sums.data(), column_sums.data(), bad);
    }
    return pair(bad);
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "CPU kernels. Use ota_kernels.backends.native; these entry points take raw tiles.";
    m.attr("SPARE") = ota::kSpare;
    m.def("instruction_sets", &instruction_sets);
    m.def("merge", &merge, "base"_a.none(), "base_code"_a, "experts"_a, "formula"_a, "out"_a, "out_code"_a,
          "candidates"_a.none(), "isa"_a);
    m.def("histogram", &histogram, "base"_a.none(), "base_code"_a, "expert"_a, "n"_a, "of_edits"_a,
          "prefix"_a, "counts"_a, "lows"_a, "isa"_a);
    m.def("edits", &per_element<&ota::Kernels::edits>, "base"_a.none(), "base_code"_a, "expert"_a, "out"_a,
          "isa"_a);
    m.def("scores", &per_element<&ota::Kernels::scores>, "base"_a.none(), "base_code"_a, "expert"_a, "out"_a,
          "isa"_a);
    m.def("run_scores", &run_scores, "base"_a.none(), "base_code"_a, "experts"_a, "n"_a, "starts"_a, "length"_a,
          "outs"_a, "places"_a.none(), "together"_a, "isa"_a);
    m.def("scatter", &scatter, "data"_a, "positions"_a, "elements"_a, "size"_a);
    m.def("is_in_memory", &ota::is_in_memory, "fd"_a);
    m.def("scatter_in_file", &scatter_in_file, "fd"_a, "begin"_a, "n"_a, "positions"_a, "elements"_a, "size"_a);
    m.def("below", &below, "alternatives"_a, "size"_a, "at"_a, "values"_a);
    m.def("between", &between, "values"_a, "low"_a, "high"_a, "out"_a, "isa"_a);
    m.def("squared_differences", &squared_differences, "values"_a, "rows"_a, "least"_a, "isa"_a);
    m.def("copy_runs", &copy_runs, "data"_a, "starts"_a, "out"_a, "run_bytes"_a);
    m.def("ask_for_runs", &ask_for_runs, "fd"_a, "starts"_a, "run_bytes"_a, "together"_a);
    m.def("power_sum", &power_sum, "curvature"_a, "n"_a, "power"_a, "isa"_a);
    m.def("row_column_sums", &row_column_sums, "curvature"_a, "row_sums"_a, "column_sums"_a, "isa"_a);
}
