// Packs among the experts of a tile that is merged: they are decoded a stretch at a time, by the thread that merges it, into
// memory that stays in its second-level cache; never as a whole tile.
#pragma once

#include <new>

#include "pack_records.hpp"
#include "undecided.hpp"

namespace ota {
namespace OTA_ISA {

// Elements of a stretch: whole spans, so that a strip never crosses an end. Five experts of 16 bits take 80 KB.
constexpr int64_t kStretch = 2 * kSpan;

class Stretches {
public:
    explicit Stretches(const Tile& tile) : tile_(&tile) {
        for (int t = 0; t < tile.n_experts; ++t) packs_ += tile.experts[t].pack.records != nullptr ? 1 : 0;
        if (packs_ == 0) return;
        alone_ = packs_ == tile.n_experts && tile.has_base() && item_size(tile.base.dtype) == 2;
        for (int t = 0; t < tile.n_experts; ++t) {
            const Expert& e = tile.experts[t];
            alone_ &= e.pack.values == Values::exact && e.pack.base == tile.base.data && e.pack.type == tile.base.dtype;
            // Of weights that are not tiny no product of an edit underflows to a zero, whose sign would tell.
            alone_ &= std::fabs(e.weight_scale) > 1e-4 && e.edit_scale == 1;
        }
        // Chances by rank are found of the whole tile, before it is merged.
        length_ = tile.words.select == Select::random_by_rank ? tile.n : kStretch;
        own_ = new Tile(tile);
        tile_ = own_;
        parts_ = new Part[packs_];
        int i = 0;
        for (int t = 0; t < tile.n_experts; ++t) {
            const Packed& pack = tile.experts[t].pack;
            if (pack.records == nullptr) continue;
            const int64_t bytes = length_ * pack.out_size();
            parts_[i++] = {t, Unpacker(pack), {}, static_cast<uint8_t*>(::operator new(bytes, kLine))};
        }
    }
    ~Stretches() {
        for (int i = 0; i < packs_; ++i) ::operator delete(parts_[i].room, kLine);
        delete[] parts_;
        delete own_;
    }
    Stretches(const Stretches&) = delete;
    Stretches& operator=(const Stretches&) = delete;

    // Whose packed experts lie where `next` decoded them.
    const Tile& tile() const { return *tile_; }

    // Whether `add` knows the sums of a merge whose edits are all added, with a number each.
    bool are_alone() const { return alone_; }

    // N of such a merge, of the stretch from element `offset` on: 0, but where some expert keeps its edit. Returns the
    // stretch's end. `back` returns to its begin.
    int64_t add(int64_t offset, float* numerator, MergeStats& stats) {
        const int64_t left = tile_->n - offset, n = length_ < left ? length_ : left;
        std::memset(numerator, 0, sizeof(float) * static_cast<size_t>(n));
        for (int i = 0; i < packs_; ++i) {
            Part& part = parts_[i];
            part.before = part.unpacker;
            const Expert& e = tile_->experts[part.expert];
            const uint8_t* base = tile_->base.data + 2 * offset;
            const float a = static_cast<float>(e.weight_scale);
            const auto adds = [=](auto widen) {
                return [=](int64_t at, const uint8_t* values, int64_t j) {
                    numerator[at] = std::fma(a, widen(values + 2 * j) - widen(base + 2 * at), numerator[at]);
                };
            };
            const int64_t to = e.pack.start + offset + n;
            const bool sound = tile_->base.dtype == DType::bf16
                                   ? part.unpacker.each(to, adds([](const uint8_t* x) { return half_at(x, 0, DType::bf16); }))
                                   : part.unpacker.each(to, adds([](const uint8_t* x) { return half_at(x, 0, DType::f16); }));
            if (!sound) stats.damaged = part.expert, stats.damaged_tile = part.unpacker.bad;
        }
        return offset + n;
    }

    void back() {
        for (int i = 0; i < packs_; ++i) parts_[i].unpacker = parts_[i].before;
    }

    // Decodes the stretch from element `offset` on. Returns its end.
    int64_t next(int64_t offset, MergeStats& stats) {
        const int64_t left = tile_->n - offset, n = packs_ > 0 && length_ < left ? length_ : left;
        for (int i = 0; i < packs_; ++i) {
            Part& part = parts_[i];
            Expert& e = own_->experts[part.expert];
            if (!part.unpacker.next(e.pack.start + offset + n, part.room))
                stats.damaged = part.expert, stats.damaged_tile = part.unpacker.bad;
            // Where element 0 would be: the kernels count from there.
            const auto place = reinterpret_cast<uintptr_t>(part.room);
            e.weights.data = reinterpret_cast<const uint8_t*>(place - static_cast<uintptr_t>(offset * e.pack.out_size()));
        }
        return offset + n;
    }

private:
    static constexpr std::align_val_t kLine{64};

    struct Part {
        int expert = -1;
        Unpacker unpacker, before;
        uint8_t* room = nullptr;
    };

    const Tile* tile_;
    Tile* own_ = nullptr;
    Part* parts_ = nullptr;
    int packs_ = 0;
    bool alone_ = false;
    int64_t length_ = 0;
};

}  // namespace OTA_ISA
}  // namespace ota
