// Part of a packed tensor as Python hands it over (PackedPart in ota_kernels/io/pack.py), read by the names of its
// attributes and checked.
#pragma once

#include "arguments.hpp"

inline ota::Packed packed(nb::handle part) {
    const auto records = array<Bytes>(part.attr("records").attr("data"), "records are bytes");
    const auto offsets = array<Ints>(part.attr("offsets"), "offsets are int64");
    const auto counts = array<Ints>(part.attr("counts"), "counts are int64");
    const auto bytes = array<Bytes>(part.attr("base").attr("data"), "a base's elements are bytes");
    const auto values = number<int>(part, "values"), type = number<int>(part, "type");
    const auto tiles = static_cast<int64_t>(counts.size());
    ota::Packed p;
    p.first = number<int64_t>(part, "first"), p.tile = number<int64_t>(part, "tile");
    p.numel = number<int64_t>(part, "numel"), p.start = number<int64_t>(part, "start");
    p.stop = number<int64_t>(part, "stop"), p.size = number<int>(part, "size");
    require(values >= 0 && values <= 2, "unknown values of a pack");
    p.values = static_cast<ota::Values>(values), p.type = static_cast<ota::DType>(type);
    p.scale = number<double>(part, "scale");
    const bool plain = type >= 0 && type <= 3 && p.size == ota::item_size(p.type);
    require(p.values == ota::Values::exact || plain, "edits are added to plain floats");
    require(p.size == 1 || p.size == 2 || p.size == 4 || p.size == 8, "elements of whole bytes");
    require(0 <= p.start && p.start <= p.stop && p.stop <= p.numel, "elements of the tensor");
    require(p.tile > 0 && p.tile <= (int64_t{1} << 30) && p.first >= 0 && p.numel < INT64_MAX - p.tile, "tiles of the tensor");
    require(tiles == 0 || p.first <= (p.numel - 1) / p.tile - (tiles - 1), "tiles of the tensor");
    require(p.start == p.stop || (p.first <= p.start / p.tile && (p.stop - 1) / p.tile < p.first + tiles),
            "tiles that hold the elements");
    require(static_cast<int64_t>(offsets.size()) == tiles + 1, "where each record begins, and the last one ends");
    for (int64_t j = 0; j < tiles; ++j) require(offsets.data()[j] <= offsets.data()[j + 1], "records in order");
    require(offsets.data()[tiles] - offsets.data()[0] == static_cast<int64_t>(records.size()), "whole records");
    p.records = records.size() ? records.data() : kNothing;
    p.end = p.records + records.size();
    p.offsets = offsets.data(), p.counts = counts.data();
    const auto n = static_cast<int64_t>(bytes.size()) / p.size;
    require(n * p.size == static_cast<int64_t>(bytes.size()), "whole elements of the base");
    p.base = bytes.data();
    if (p.values == ota::Values::shared) {
        const nb::object shared = part.attr("shared");
        const auto halves = array<Bytes>(shared.attr("data"), "the shared edit is bytes");
        p.shared = halves.data(), p.shared_type = dtype(shared.attr("dtype"));
        require(ota::item_size(p.shared_type) == 2, "a shared edit of 16 bits");
        require(static_cast<int64_t>(halves.size()) == 2 * n, "the shared edit's elements");
    }
    return p;
}

// Of all elements from `start` to `stop`, of which there are n.
inline ota::Packed packed(nb::handle part, int64_t n) {
    const ota::Packed p = packed(part);
    const auto bytes = array<Bytes>(part.attr("base").attr("data"), "a base's elements are bytes");
    require(p.stop - p.start == n && static_cast<int64_t>(bytes.size()) == n * p.size, "the base's elements");
    return p;
}
