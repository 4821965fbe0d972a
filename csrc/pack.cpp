// Packed experts: the base's elements with a pack's edits on them, tile by tile. The format is in
// ota_kernels/io/README.md. Records are hostile input: every position, count and length is checked.

#include "pack.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#define OTA_ISA packs
#include "formats.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace ota::OTA_ISA;
using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OutBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// The first byte of a mask: a Rice parameter, or one of these.
constexpr int kMostRice = 16, kBitmap = 64, kAll = 65;

enum class Values { exact, sign, shared };

// Bits of a record, the lowest of each byte first.
class Bits {
public:
    Bits(const uint8_t* begin, const uint8_t* end) : next_(begin), end_(end) {}

    // Zeros before the next one, which is taken too; -1 where there is none, or more than `most`.
    int64_t zeros(int64_t most) {
        int64_t found = 0;
        for (;;) {
            refill();
            if (window_ != 0) break;
            found += bits_, bits_ = 0;
            if (found > most || next_ == end_) return -1;
        }
        const int more = __builtin_ctzll(window_);
        found += more;
        window_ = more == 63 ? 0 : window_ >> (more + 1);
        bits_ -= more + 1;
        return found > most ? -1 : found;
    }

    // A number of k bits; -1 where there are fewer.
    int64_t number(int k) {
        if (bits_ < k) refill();
        if (bits_ < k) return -1;
        const auto found = static_cast<int64_t>(window_ & ((uint64_t(1) << k) - 1));
        window_ >>= k, bits_ -= k;
        return found;
    }

    // Whether a whole byte is left.
    bool has_more() const { return 8 * (end_ - next_) + bits_ >= 8; }

private:
    void refill() {
        if (end_ - next_ >= 8) {
            uint64_t more;
            std::memcpy(&more, next_, 8);
            const int bytes = (63 - bits_) >> 3;
            if (bytes == 0) return;
            window_ |= more << bits_;
            next_ += bytes, bits_ += 8 * bytes;
            if (bits_ < 64) window_ &= (uint64_t(1) << bits_) - 1;
            return;
        }
        for (; bits_ <= 56 && next_ < end_; bits_ += 8) window_ |= static_cast<uint64_t>(*next_++) << bits_;
    }

    const uint8_t *next_, *end_;
    uint64_t window_ = 0;
    int bits_ = 0;
};

// Calls edit(position in the tile, number among the kept) for each kept element of a tile of n, in order. False where
// the mask is not one of `count` elements.
template <typename Edit>
bool each_kept(const uint8_t* mask, int64_t bytes, int64_t n, int64_t count, Edit edit) {
    if (bytes == 0) return count == 0;
    const int code = *mask++;
    --bytes;
    int64_t i = 0;
    if (code == kAll) {
        if (bytes != 0 || count != n) return false;
        for (; i < n; ++i) edit(i, i);
        return true;
    }
    if (code == kBitmap) {
        if (bytes != (n + 7) / 8) return false;
        for (int64_t at = 0; at < bytes; at += 8) {
            uint64_t word = 0;
            std::memcpy(&word, mask + at, static_cast<size_t>(std::min<int64_t>(8, bytes - at)));
            for (; word != 0; word &= word - 1) {
                const int64_t position = 8 * at + __builtin_ctzll(word);
                if (position >= n || i == count) return false;
                edit(position, i++);
            }
        }
        return i == count;
    }
    if (code > kMostRice) return false;
    Bits bits(mask, mask + bytes);
    for (int64_t position = -1; i < count; ++i) {
        const int64_t high = bits.zeros(n), low = high < 0 ? -1 : bits.number(code);
        if (low < 0) return false;
        position += 1 + (high << code) + low;
        if (position >= n) return false;
        edit(position, i);
    }
    return !bits.has_more();
}

struct Work {
    const uint8_t *base, *records, *shared;
    ota::DType type, shared_type;
    const int64_t *offsets, *counts;  // of records, by tile: where they begin, the last one's end; elements kept
    int64_t first, tiles, tile, numel, start, stop;
    Values values;
    double scale;
    uint8_t* out;
};

// Calls of_tile(record, mask bytes, values, elements, window begin, window end, first flat index) for each tile.
template <typename OfTile>
int64_t by_tiles(const Work& w, int64_t value_bits, OfTile of_tile) {
    for (int64_t j = 0; j < w.tiles; ++j) {
        const int64_t from = (w.first + j) * w.tile, n = std::min(w.tile, w.numel - from);
        const uint8_t* record = w.records + (w.offsets[j] - w.offsets[0]);
        const int64_t bytes = w.offsets[j + 1] - w.offsets[j], count = w.counts[j];
        const int64_t of_values = (count * value_bits + 7) / 8;
        if (count < 0 || count > n || of_values > bytes) return j;
        const int64_t begin = std::max(w.start, from) - from, end = std::min(w.stop, from + n) - from;
        if (!of_tile(record, bytes - of_values, record + bytes - of_values, n, count, begin, end, from)) return j;
    }
    return -1;
}

// Elements of Size bytes: the base's, and the expert's where they are kept.
template <int Size>
int64_t exact(const Work& w) {
    std::memcpy(w.out, w.base, static_cast<size_t>(w.stop - w.start) * Size);
    return by_tiles(w, 8 * Size, [&](const uint8_t* record, int64_t mask, const uint8_t* values, int64_t n, int64_t count,
                                     int64_t begin, int64_t end, int64_t from) {
        uint8_t* out = w.out + (from - w.start) * Size;
        return each_kept(record, mask, n, count, [&](int64_t p, int64_t i) {
            if (p >= begin && p < end) std::memcpy(out + p * Size, values + i * Size, Size);
        });
    });
}

template <typename Acc>
void load_base(const Work& w, Acc* out) {
    const int64_t size = ota::item_size(w.type);
    for (int64_t i = 0; i < w.stop - w.start; ++i) {
        const uint8_t* at = w.base + i * size;
        uint16_t half = 0;
        float single = 0;
        double wide = 0;
        switch (w.type) {
            case ota::DType::bf16: std::memcpy(&half, at, 2), out[i] = from_bf16(half); break;
            case ota::DType::f16: std::memcpy(&half, at, 2), out[i] = from_f16(half); break;
            case ota::DType::f64: std::memcpy(&wide, at, 8), out[i] = static_cast<Acc>(wide); break;
            default: std::memcpy(&single, at, 4), out[i] = single;
        }
    }
}

template <typename Acc>
Acc shared_at(const Work& w, int64_t i) {
    uint16_t half;
    std::memcpy(&half, w.shared + 2 * i, 2);
    return static_cast<Acc>(w.shared_type == ota::DType::bf16 ? from_bf16(half) : from_f16(half));
}

// w_0 + scale sign, or w_0 + scale e of the experts' shared edit e: one product and one sum, in Acc.
template <typename Acc>
int64_t edited(const Work& w) {
    auto* all = reinterpret_cast<Acc*>(w.out);
    load_base(w, all);
    const Acc scale = static_cast<Acc>(w.scale);
    const bool of_signs = w.values == Values::sign;
    return by_tiles(w, of_signs ? 1 : 0, [&](const uint8_t* record, int64_t mask, const uint8_t* values, int64_t n,
                                             int64_t count, int64_t begin, int64_t end, int64_t from) {
        Acc* out = all + (from - w.start);
        return each_kept(record, mask, n, count, [&](int64_t p, int64_t i) {
            if (p < begin || p >= end) return;
            if (of_signs) {
                out[p] += values[i >> 3] >> (i & 7) & 1 ? scale : -scale;
                return;
            }
            out[p] += scale * shared_at<Acc>(w, from - w.start + p);
        });
    });
}

// Elements at ascending positions: `base` and `shared` hold those alone, and so does `out`. Stored: of the base, Acc: of
// what comes out.
template <typename Put>
int64_t at_positions(const Work& w, const int64_t* positions, int64_t count, int64_t value_bits, Put put) {
    for (int64_t g = 0; g < count;) {
        const int64_t j = positions[g] / w.tile, from = j * w.tile, n = std::min(w.tile, w.numel - from);
        int64_t end = g;
        while (end < count && positions[end] < from + n) ++end;
        const uint8_t* record = w.records + w.offsets[j];
        const int64_t bytes = w.offsets[j + 1] - w.offsets[j], of_values = (w.counts[j] * value_bits + 7) / 8;
        if (w.counts[j] < 0 || w.counts[j] > n || of_values > bytes) return j;
        const uint8_t* values = record + bytes - of_values;
        const bool sound = each_kept(record, bytes - of_values, n, w.counts[j], [&](int64_t p, int64_t i) {
            while (g < end && positions[g] < from + p) ++g;
            for (; g < end && positions[g] == from + p; ++g) put(g, values, i);
        });
        if (!sound) return j;
        g = end;
    }
    return -1;
}

template <typename Acc>
int64_t edited_at(const Work& w, const int64_t* positions, int64_t count) {
    auto* out = reinterpret_cast<Acc*>(w.out);
    load_base(w, out);
    const Acc scale = static_cast<Acc>(w.scale);
    const bool of_signs = w.values == Values::sign;
    return at_positions(w, positions, count, of_signs ? 1 : 0, [&](int64_t g, const uint8_t* values, int64_t i) {
        if (of_signs)
            out[g] += values[i >> 3] >> (i & 7) & 1 ? scale : -scale;
        else
            out[g] += scale * shared_at<Acc>(w, g);
    });
}

int64_t exact_at(const Work& w, const int64_t* positions, int64_t count, int64_t size) {
    std::memcpy(w.out, w.base, static_cast<size_t>(count * size));
    return at_positions(w, positions, count, 8 * size, [&](int64_t g, const uint8_t* values, int64_t i) {
        std::memcpy(w.out + g * size, values + i * size, static_cast<size_t>(size));
    });
}

void require(bool ok, const char* what) {
    if (!ok) throw std::invalid_argument(what);
}

// What both entry points take, checked. n: elements that come out.
Work work_of(const Bytes& base, int64_t size, int type, const Bytes& records, const Ints& offsets, const Ints& counts,
             int64_t first, int64_t tile, int64_t numel, int64_t n, int values, double scale,
             const std::optional<Bytes>& shared, int shared_type, const OutBytes& out) {
    const auto kind = static_cast<Values>(values);
    const auto code = static_cast<ota::DType>(type);
    const auto tiles = static_cast<int64_t>(counts.size());
    require(values >= 0 && values <= 2 && (kind == Values::exact || (type >= 0 && type <= 3)), "unknown codes");
    require(size == 1 || size == 2 || size == 4 || size == 8, "elements of whole bytes");
    require(kind == Values::exact || size == ota::item_size(code), "a size that is the type's");
    require(tile > 0 && first >= 0 && (tiles == 0 || (first + tiles - 1) * tile < numel), "tiles of the tensor");
    require(static_cast<int64_t>(offsets.size()) == tiles + 1, "where each record begins, and the last one ends");
    for (int64_t j = 0; j < tiles; ++j) require(offsets.data()[j] <= offsets.data()[j + 1], "records in order");
    require(offsets.data()[tiles] - offsets.data()[0] == static_cast<int64_t>(records.size()), "whole records");
    require(static_cast<int64_t>(base.size()) == n * size, "the base's elements");
    const int64_t of_out = kind == Values::exact ? size : code == ota::DType::f64 ? 8 : 4;
    require(static_cast<int64_t>(out.size()) == n * of_out, "room for the elements");
    require(kind == Values::exact || reinterpret_cast<uintptr_t>(out.data()) % 8 == 0, "aligned room");
    if (kind == Values::shared)
        require(shared && static_cast<int64_t>(shared->size()) == 2 * n && (shared_type == 1 || shared_type == 2),
                "the shared edit's elements");
    return {base.data(),    records.data(), shared ? shared->data() : nullptr,
            code,           static_cast<ota::DType>(shared_type),
            offsets.data(), counts.data(),  first, tiles, tile, numel, 0, n, kind, scale, out.data()};
}

// Elements [start, stop), which the tiles from `first` on hold. The number of a tile whose record is none of its own, -1.
int64_t unpack(Bytes base, int64_t size, int type, Bytes records, Ints offsets, Ints counts, int64_t first, int64_t tile,
               int64_t numel, int64_t start, int64_t stop, int values, double scale, std::optional<Bytes> shared,
               int shared_type, OutBytes out) {
    require(0 <= start && start <= stop && stop <= numel, "elements of the tensor");
    Work w = work_of(base, size, type, records, offsets, counts, first, tile, numel, stop - start, values, scale, shared,
                     shared_type, out);
    require(w.tiles > 0 && first * tile <= start && stop <= (first + w.tiles) * tile, "tiles that hold the elements");
    w.start = start, w.stop = stop;
    nb::gil_scoped_release unlocked;
    if (w.values != Values::exact) return w.type == ota::DType::f64 ? edited<double>(w) : edited<float>(w);
    return size == 1 ? exact<1>(w) : size == 2 ? exact<2>(w) : size == 4 ? exact<4>(w) : exact<8>(w);
}

// Elements at ascending positions of a tensor; base, shared: theirs alone; records, offsets, counts: of all tiles.
int64_t unpack_at(Bytes base, int64_t size, int type, Bytes records, Ints offsets, Ints counts, int64_t tile,
                  int64_t numel, Ints positions, int values, double scale, std::optional<Bytes> shared, int shared_type,
                  OutBytes out) {
    const auto n = static_cast<int64_t>(positions.size());
    const Work w = work_of(base, size, type, records, offsets, counts, 0, tile, numel, n, values, scale, shared,
                           shared_type, out);
    require(w.tiles * tile >= numel && offsets.data()[0] == 0, "all tiles");
    for (int64_t i = 0; i < n; ++i)
        require(positions.data()[i] >= (i ? positions.data()[i - 1] : 0) && positions.data()[i] < numel, "in order");
    nb::gil_scoped_release unlocked;
    if (w.values == Values::exact) return exact_at(w, positions.data(), n, size);
    return w.type == ota::DType::f64 ? edited_at<double>(w, positions.data(), n) : edited_at<float>(w, positions.data(), n);
}

}  // namespace

void bind_packs(nb::module_& m) {
    m.def("unpack", &unpack, "base"_a, "size"_a, "type"_a, "records"_a, "offsets"_a, "counts"_a, "first"_a, "tile"_a, "numel"_a,
          "start"_a, "stop"_a, "values"_a, "scale"_a, "shared"_a.none(), "shared_type"_a, "out"_a);
    m.def("unpack_at", &unpack_at, "base"_a, "size"_a, "type"_a, "records"_a, "offsets"_a, "counts"_a, "tile"_a, "numel"_a,
          "positions"_a, "values"_a, "scale"_a, "shared"_a.none(), "shared_type"_a, "out"_a);
}
