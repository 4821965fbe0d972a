// What Python hands over, read by the names of its attributes (tensors/tile.py, tensors/terms.py): sizes and codes are
// checked once, here. Every array is flat; tensors arrive as their bytes (uint8).
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace nb = nanobind;

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using OutFloats = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutDoubles = nb::ndarray<double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Positions = nb::ndarray<const uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutPositions = nb::ndarray<uint32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutInts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

inline void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// An array that the caller holds: no copy, which would be lost.
template <typename Array>
Array array(nb::handle object, const char* what) {
    Array found;
    if (!nb::try_cast<Array>(object, found, false)) throw std::invalid_argument(what);
    return found;
}

template <typename T>
T number(nb::handle object, const char* name) {
    return nb::cast<T>(object.attr(name));
}

inline float float32(nb::handle object, const char* name) { return static_cast<float>(number<double>(object, name)); }

inline ota::DType dtype(nb::handle of) {
    const auto code = number<int>(of, "code");
    require(code >= 0 && code <= 5, "unknown element type code");
    return static_cast<ota::DType>(code);
}

// Element 0 of no elements: an operand that is there.
inline const uint8_t kNothing[8] = {};

inline ota::Operand operand(nb::handle buffer, int64_t n) {
    const auto data = array<Bytes>(buffer.attr("data"), "an input is no flat array of bytes");
    const ota::DType type = dtype(buffer.attr("dtype"));
    require(static_cast<int64_t>(data.size()) == n * ota::item_size(type), "an input has not n elements");
    return {n == 0 ? kNothing : data.data(), type};
}

inline ota::Packed packed(nb::handle part, int64_t n);  // pack_arguments.hpp

inline bool is_packed(nb::handle buffer) { return nb::hasattr(buffer, "records"); }

inline ota::Curvature curvature(nb::handle given, int64_t n) {
    ota::Curvature c;
    const auto kind = nb::cast<std::string>(nb::handle(given.type()).attr("__name__"));
    if (kind == "Uniform") return c;
    if (kind == "Full") {
        c.kind = ota::CurvatureKind::full;
        c.values = operand(given.attr("values"), n);
        return c;
    }
    c.start = number<int64_t>(given, "start");
    int64_t rows = 0;
    if (kind == "Log8") {
        c.kind = ota::CurvatureKind::log8;
        const auto codes = array<Bytes>(given.attr("codes").attr("data"), "codes are bytes");
        const auto scales = array<Floats>(given.attr("scales"), "scales are float32");
        require(static_cast<int64_t>(codes.size()) == n, "as many codes as elements");
        c.codes = codes.data(), c.rows = scales.data();
        c.n_columns = number<int64_t>(given, "columns"), rows = static_cast<int64_t>(scales.size());
    } else if (kind == "Rank1") {
        c.kind = ota::CurvatureKind::rank1;
        const auto of_rows = array<Floats>(given.attr("rows"), "row factors are float32");
        const auto of_columns = array<Floats>(given.attr("columns"), "column factors are float32");
        c.rows = of_rows.data(), c.columns = of_columns.data();
        c.n_columns = static_cast<int64_t>(of_columns.size()), rows = static_cast<int64_t>(of_rows.size());
    } else {
        require(kind == "LowRank", "unknown curvature");
        c.kind = ota::CurvatureKind::low_rank;
        const auto left = array<Matrix>(given.attr("left"), "left factors are float32[m, r]");
        const auto right = array<Matrix>(given.attr("right"), "right factors are float32[r, n]");
        require(left.shape(1) == right.shape(0) && right.shape(0) > 0, "factors of different ranks, or of none");
        c.rows = left.data(), c.columns = right.data(), c.rank = static_cast<int64_t>(right.shape(0));
        c.n_columns = static_cast<int64_t>(right.shape(1)), rows = static_cast<int64_t>(left.shape(0));
    }
    require((c.n_columns > 0 || n == 0) && c.start >= 0, "curvature of no columns");
    require(rows * c.n_columns >= c.start + n, "row factors that end before the tile");
    return c;
}

// The numbers that the words ask for.
inline void read_numbers(nb::handle terms, const ota::Words& words, ota::Expert& e) {
    e.threshold = float32(terms, "threshold");
    e.score_scale = float32(terms, "score_scale");
    e.weight_scale = number<double>(terms, "weight_scale");
    e.edit_scale = number<double>(terms, "edit_scale");
    e.vote = float32(terms, "vote");
    e.trim = float32(terms, "trim");
    e.span = number<uint32_t>(terms, "span");
    e.first = number<int64_t>(terms, "first"), e.last = number<int64_t>(terms, "last");
    if (words.select == ota::Select::between)
        e.upper = float32(terms, "upper"), e.upto = number<int64_t>(terms, "upto");
    if (words.weigh == ota::Weigh::alone) e.alone = number<double>(terms, "alone");
    if (words.select == ota::Select::random || words.select == ota::Select::random_by_rank) {
        e.probability = number<double>(terms, "probability"), e.spread = number<double>(terms, "spread");
        e.position = number<uint32_t>(terms, "position");
    }
}

// Arrays that have a number for each row or column.
inline void read_arrays(nb::handle terms, const ota::Tile& tile, int64_t end, ota::Expert& e) {
    const bool by_column = tile.words.weigh == ota::Weigh::by_column;
    const auto reaches = [&](int64_t rows) { return rows * tile.columns >= end; };
    if (by_column || tile.words.weigh == ota::Weigh::by_row) {
        const auto weights = array<Doubles>(terms.attr("weights"), "weights by row or column are float64");
        const auto size = static_cast<int64_t>(weights.size());
        require(by_column ? size == tile.columns || tile.n == 0 : reaches(size), "a weight for each row or column");
        e.weights_at = weights.data();
    }
    if (tile.words.score == ota::Score::row_magnitude) {
        const auto rows = array<Floats>(terms.attr("row_scores"), "scores of rows are float32");
        require(reaches(static_cast<int64_t>(rows.size())), "a score for each row");
        e.row_scores = rows.data();
    }
}

// Where the elements lie. Returns the end of what rows must reach.
inline int64_t read_place(nb::handle inputs, ota::Tile& tile) {
    const nb::object shape = inputs.attr("shape");
    const size_t dimensions = nb::len(shape);
    tile.columns = dimensions == 0 ? 1 : std::max<int64_t>(1, nb::cast<int64_t>(shape[dimensions - 1]));
    tile.start = number<int64_t>(inputs, "start");
    require(tile.start >= 0, "a tile that starts before its tensor");
    if (inputs.attr("index").is_none()) return tile.start + tile.n;
    const auto index = array<Ints>(inputs.attr("index"), "the index of gathered elements is int64");
    require(static_cast<int64_t>(index.size()) == tile.n, "an index for each gathered element");
    static const int64_t nowhere = 0;
    tile.index = tile.n == 0 ? &nowhere : index.data();
    int64_t end = 0;
    for (int64_t i = 0; i < tile.n; ++i) {
        require(tile.index[i] >= 0, "an index before the tensor");
        end = std::max(end, tile.index[i] + 1);
    }
    return end;
}

// The inputs of TensorInputs, with no terms yet. decodes: whether experts may be packed, else they are asked for their
// elements.
inline int64_t read_inputs(nb::handle inputs, ota::Tile& tile, bool decodes = false) {
    const nb::object experts = inputs.attr("experts"), curvatures = inputs.attr("curvatures");
    const nb::object origins = inputs.attr("origins"), base = inputs.attr("base");
    tile.n_experts = static_cast<int>(nb::len(experts));
    require(tile.n_experts >= 1 && tile.n_experts <= ota::kMaxExperts, "1 to 64 experts can be merged");
    require(nb::len(curvatures) == nb::len(experts), "a curvature for each expert");
    require(nb::len(origins) == 0 || nb::len(origins) == nb::len(experts), "an origin for each expert, or none");
    tile.n = static_cast<int64_t>(nb::len(nb::object(experts[0])));
    if (!base.is_none()) tile.base = operand(base, tile.n);
    for (int t = 0; t < tile.n_experts; ++t) {
        ota::Expert& e = tile.experts[t];
        const nb::object weights = experts[t];
        if (decodes && tile.n > 0 && is_packed(weights)) {
            e.pack = packed(weights, tile.n);
            e.weights = {nullptr, e.pack.out_type()};
        } else {
            e.weights = operand(weights, tile.n);
        }
        e.curvature = curvature(curvatures[t], tile.n);
        if (nb::len(origins) > 0 && !nb::object(origins[t]).is_none()) e.origin = operand(origins[t], tile.n);
    }
    return read_place(inputs, tile);
}

inline ota::Words read_words(nb::handle words) {
    const auto codes = nb::cast<std::vector<int>>(words.attr("codes"));  // in the order of terms.WORDS
    require(codes.size() == 6, "six words");
    return {static_cast<ota::Edit>(codes[0]),  static_cast<ota::Score>(codes[1]), static_cast<ota::Select>(codes[2]),
            static_cast<ota::Elect>(codes[3]), static_cast<ota::Weigh>(codes[4]), static_cast<ota::Divide>(codes[5])};
}

// A tile (TensorInputs) and what is to be computed of it (Terms).
inline std::unique_ptr<ota::Tile> read(nb::handle inputs, nb::handle terms, bool decodes = false) {
    auto tile = std::make_unique<ota::Tile>();
    const int64_t end = read_inputs(inputs, *tile, decodes);
    tile->words = read_words(terms.attr("words"));
    const nb::object experts = terms.attr("experts");
    require(static_cast<int>(nb::len(experts)) == tile->n_experts, "terms of another number of experts");
    for (int t = 0; t < tile->n_experts; ++t) {
        read_numbers(experts[t], tile->words, tile->experts[t]);
        read_arrays(experts[t], *tile, end, tile->experts[t]);
    }
    ota::Numbers& x = tile->numbers;
    x.power = number<double>(terms, "power"), x.epsilon = number<double>(terms, "epsilon");
    x.lambda = number<double>(terms, "lambda_"), x.denominator = number<double>(terms, "denominator");
    x.least = number<double>(terms, "least"), x.clip = number<double>(terms, "clip");
    x.tie = float32(terms, "tie"), x.agreement = float32(terms, "agreement");
    x.needed = number<int32_t>(terms, "needed");
    x.fallback_to_base = number<std::string>(terms, "fallback") == "base";
    x.zero_is_one = number<std::string>(terms, "zero") == "one";
    x.repair = number<bool>(terms, "repair");
    const ota::Select select = tile->words.select;
    if (select == ota::Select::random || select == ota::Select::random_by_rank) {
        x.seed = nb::cast<uint64_t>(terms.attr("seed") & nb::int_(0xffffffffu));
        x.name_hash = number<uint64_t>(terms, "name_hash");
    }
    if (select == ota::Select::random_by_rank) {
        const nb::object ranked = terms.attr("ranked");
        tile->ranked = nb::cast<int64_t>(ranked[0]), tile->apart = nb::cast<int64_t>(ranked[1]);
        const int64_t block = tile->ranked * tile->apart;
        const bool whole = tile->n == 0 || (block > 0 && tile->start % block == 0 && tile->n % block == 0);
        require(tile->index == nullptr && whole, "`random by rank` takes tiles of whole rows");
    }
    return tile;
}

// The lists of native.Room: room for every element of the tile and kSpare more.
inline ota::Candidates candidates(nb::handle lists, const ota::Tile& tile, ota::DType out) {
    const auto room = [&](nb::handle given, int size) {
        const auto a = array<OutBytes>(given, "lists of candidates are bytes");
        require(static_cast<int64_t>(a.size()) >= size * (tile.n + ota::kSpare), "too little room for candidates");
        return a.data();
    };
    const auto numbers = [&](nb::handle given) { return reinterpret_cast<uint32_t*>(room(given, 4)); };
    ota::Candidates c;
    c.index = numbers(lists.attr("positions"));
    if (tile.has_base()) c.base = room(lists.attr("base"), ota::item_size(tile.base.dtype));
    for (int t = 0; t < tile.n_experts; ++t) {
        const ota::Expert& e = tile.experts[t];
        c.weights[t] = room(lists.attr("weights")[t], ota::item_size(e.weights.dtype));
        if (e.origin.data) c.origins[t] = room(lists.attr("origins")[t], ota::item_size(e.origin.dtype));
        if (e.curvature.kind != ota::CurvatureKind::uniform)
            c.curvature[t] = reinterpret_cast<float*>(room(lists.attr("curvatures")[t], 4));
        if (e.span == 0) continue;
        c.steps[t] = numbers(lists.attr("steps")[t]);
        const nb::object alternatives = lists.attr("alternatives")[t];
        ota::Alternatives& a = c.alternatives[t];
        a.index = numbers(alternatives.attr("positions")), a.steps = numbers(alternatives.attr("steps"));
        a.merged = room(alternatives.attr("merged"), ota::item_size(out));
    }
    return c;
}
