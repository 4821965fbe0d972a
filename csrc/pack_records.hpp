// Elements of packed experts: a base's, with a pack's edits on them, decoded a stretch at a time. The format is in
// ota_kernels/io/README.md. Records are hostile input: every position, count and length is checked. Compiled once per
// instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "formats.hpp"

namespace ota {
namespace OTA_ISA {

// The first byte of a mask: a Rice parameter, or one of these.
constexpr int kMostRice = 16, kBitmap = 64, kAll = 65;

// The elements that a tile of n keeps, `count` of them, in order. Positions are found a batch at a time: of Rice codes each
// begins where the last one ends, and nothing else should wait for that.
class Kept {
public:
    Kept() = default;
    // limit: up to which memory may be read, at or after the mask's end.
    Kept(const uint8_t* mask, int64_t bytes, const uint8_t* limit, int64_t n, int64_t count)
        : next_byte_(mask), end_(mask + bytes), limit_(limit), n_(n), count_(count) {
        sound_ = bytes > 0 || count == 0;
        if (bytes == 0) return;
        code_ = *next_byte_++;
        if (code_ == kAll) {
            sound_ = next_byte_ == end_ && count == n;
        } else if (code_ == kBitmap) {
            sound_ = end_ - next_byte_ == (n + 7) / 8;
            last_ = -64;
        } else {
            sound_ = code_ <= kMostRice;
            last_ = -1;
        }
    }

    // Calls edit(position, number among the kept) for those below `stop` that are left.
    template <typename Edit>
    void until(int64_t stop, Edit edit) {
        do {
            int i = taken_;
            for (; i < found_ && at_[i] < stop; ++i) edit(int64_t{at_[i]}, number_ + i);
            taken_ = i;
        } while (taken_ == found_ && find_more());
    }

    // After until(n): whether the mask was one of `count` elements.
    bool is_sound() const {
        if (!sound_ || number_ + found_ != count_) return false;
        if (code_ == kAll || count_ == 0) return count_ > 0 || next_byte_ == end_;
        if (code_ == kBitmap) return window_ == 0;
        const int64_t left = 8 * (end_ - next_byte_) + bits_;
        return 0 <= left && left < 8;
    }

private:
    static constexpr int kMost = 64;  // positions of a batch
    static constexpr int kTogether = 4;  // Rice codes that the 56 bits of a window nearly always hold

    // The next batch. False where there is none.
    bool find_more() {
        number_ += found_;
        found_ = taken_ = 0;
        const int64_t left = count_ - number_;
        if (left <= 0 || !sound_) return false;
        const int most = left < kMost ? static_cast<int>(left) : kMost;
        if (code_ == kAll) {
            for (; found_ < most; ++found_) at_[found_] = static_cast<int32_t>(number_ + found_);
        } else if (code_ == kBitmap) {
            find_bits(most);
        } else {
            find_codes(most);
        }
        return found_ > 0;
    }

    void find_bits(int most) {
        while (found_ < most) {
            if (window_ == 0) {
                const int64_t left = end_ - next_byte_, bytes = left < 8 ? left : 8;
                if (bytes <= 0) break;
                std::memcpy(&window_, next_byte_, static_cast<size_t>(bytes));
                last_ += 64, next_byte_ += bytes;
                continue;
            }
            const int64_t position = last_ + __builtin_ctzll(window_);
            if (position >= n_) return fail();
            window_ &= window_ - 1;
            at_[found_++] = static_cast<int32_t>(position);
        }
        // Bits that are left over: more than `count`, or beyond the tile.
        while (number_ + found_ == count_ && window_ == 0 && next_byte_ < end_) window_ = *next_byte_++;
    }

    void find_codes(int most) {
        uint64_t window = window_;
        int bits = bits_, found = 0;
        int64_t last = last_;
        const int code = code_;
        const uint64_t low = (uint64_t{1} << code) - 1;
        const uint8_t* next = next_byte_;
        bool whole = true;
        while (whole && most - found >= kTogether && limit_ - next >= 8) {
            refill(next, window, bits);
            int i = 0;
            for (; i < kTogether; ++i) {
                const int zeros = window != 0 ? __builtin_ctzll(window) : 64, size = zeros + 1 + code;
                if (size > bits) break;
                const uint64_t rest = window >> zeros >> 1;
                last += 1 + (static_cast<int64_t>(zeros) << code) + static_cast<int64_t>(rest & low);
                at_[found + i] = static_cast<int32_t>(last);  // looked at below: positions ascend
                window = rest >> code, bits -= size;
            }
            found += i;
            whole = i > 0 && last < n_;
        }
        window_ = window, bits_ = bits, next_byte_ = next, found_ = found;
        if (found > 0 && last >= n_) {
            while (found_ > 0 && at_[found_ - 1] >= n_) --found_;
            return fail();
        }
        last_ = last;
        while (found_ < most) {
            const int64_t position = next_position();
            if (position < 0) return fail();
            at_[found_++] = static_cast<int32_t>(last_ = position);
        }
    }

    // Bits of the window that count are at least 56 afterwards. Those above them are the next ones, or 0.
    static void refill(const uint8_t*& next, uint64_t& window, int& bits) {
        uint64_t more;
        std::memcpy(&more, next, 8);
        window |= more << bits;
        next += (63 - bits) >> 3;
        bits |= 56;
    }

    void refill() {
        if (limit_ - next_byte_ >= 8) return refill(next_byte_, window_, bits_);
        for (; bits_ <= 56 && next_byte_ < limit_; bits_ += 8) window_ |= static_cast<uint64_t>(*next_byte_++) << bits_;
    }

    void take(int bits) { window_ >>= bits, bits_ -= bits; }

    // The position after the last one; -1 where no code of the tile is left.
    int64_t next_position() {
        int64_t zeros = 0;
        for (;;) {
            refill();
            const int some = window_ != 0 ? __builtin_ctzll(window_) : 64;
            if (some < bits_) {
                zeros += some;
                take(some), take(1);
                break;
            }
            if (bits_ == 0 || zeros > n_) return -1;
            zeros += bits_;
            window_ = 0, bits_ = 0;
        }
        if (bits_ < code_) refill();
        if (bits_ < code_) return -1;
        const auto low = static_cast<int64_t>(window_ & ((uint64_t{1} << code_) - 1));
        take(code_);
        const int64_t position = last_ + 1 + (zeros << code_) + low;
        return position < n_ ? position : -1;
    }

    void fail() { sound_ = false; }

    const uint8_t *next_byte_ = nullptr, *end_ = nullptr, *limit_ = nullptr;
    int64_t n_ = 0, count_ = 0, number_ = 0;  // number_: of the batch's first among the kept
    int64_t last_ = 0;                        // the last position found; of a bitmap: the window's first
    uint64_t window_ = 0;
    int bits_ = 0, code_ = 0;
    bool sound_ = true;
    int found_ = 0, taken_ = 0;  // of the batch
    int32_t at_[kMost];
};

// A tile of a pack: which elements it keeps, and their values.
struct Record {
    int64_t from = 0, n = 0;  // flat index of its first element; its elements
    Kept kept;
    const uint8_t* values = nullptr;

    Record() = default;
    // j: its number among those whose records are there.
    Record(const Packed& p, int64_t j) : from((p.first + j) * p.tile), n(p.numel - from < p.tile ? p.numel - from : p.tile) {
        const uint8_t* record = p.records + (p.offsets[j] - p.offsets[0]);
        const int64_t bytes = p.offsets[j + 1] - p.offsets[j], count = p.counts[j];
        const int64_t bits = p.values == Values::exact ? 8 * p.size : p.values == Values::sign ? 1 : 0;
        const bool some = 0 <= count && count <= n;
        const int64_t of_values = some ? (count * bits + 7) / 8 : 0;
        const bool sound = some && of_values <= bytes;
        values = record + (sound ? bytes - of_values : 0);
        kept = Kept(record, sound ? bytes - of_values : 0, p.end, n, sound ? count : 1);  // no mask of no bytes keeps one
    }

    // Whether it is a record of this tile: what is left of it is looked at.
    bool is_sound() {
        kept.until(n, [](int64_t, int64_t) {});
        return kept.is_sound();
    }
};

inline float half_at(const uint8_t* data, int64_t i, DType type) {
    uint16_t half;
    std::memcpy(&half, data + 2 * i, 2);
    return type == DType::bf16 ? from_bf16(half) : from_f16(half);
}

inline void widen(const uint8_t* base, DType, int64_t n, double* out) {
    std::memcpy(out, base, sizeof(double) * static_cast<size_t>(n));
}

inline void widen(const uint8_t* base, DType type, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kStrip) {
        const int some = n - i < kStrip ? static_cast<int>(n - i) : kStrip;
        const float* values = load(Operand{base, type}, i, some, out + i);
        if (values != out + i) std::memcpy(out + i, values, sizeof(float) * static_cast<size_t>(some));
    }
}

// The expert's elements where an edit is kept: the base's n elements become them. each(put) calls put(place among the n,
// values of its tile, number among the tile's kept) for each.
template <int Size, typename Each>
bool exact(const uint8_t* base, int64_t n, uint8_t* out, Each each) {
    std::memcpy(out, base, static_cast<size_t>(n * Size));
    return each([=](int64_t at, const uint8_t* values, int64_t i) { std::memcpy(out + at * Size, values + i * Size, Size); });
}

// w_0 + scale sign, or w_0 + scale e of the experts' shared edit e: one product and one sum, in Acc.
template <typename Acc, typename Each>
bool edited(const Packed& p, const uint8_t* base, const uint8_t* shared, int64_t n, Acc* out, Each each) {
    widen(base, p.type, n, out);
    const Acc scale = static_cast<Acc>(p.scale);
    if (p.values == Values::sign)
        return each([=](int64_t at, const uint8_t* values, int64_t i) {
            out[at] += values[i >> 3] >> (i & 7) & 1 ? scale : -scale;
        });
    const DType type = p.shared_type;
    return each([=](int64_t at, const uint8_t*, int64_t) { out[at] += scale * static_cast<Acc>(half_at(shared, at, type)); });
}

// n elements to `out`, which is aligned to an element where edits are added. Returns what `each` does.
template <typename Each>
bool decode(const Packed& p, const uint8_t* base, const uint8_t* shared, int64_t n, uint8_t* out, Each each) {
    if (p.values != Values::exact)
        return p.is_wide() ? edited(p, base, shared, n, reinterpret_cast<double*>(out), each)
                           : edited(p, base, shared, n, reinterpret_cast<float*>(out), each);
    switch (p.size) {
        case 1: return exact<1>(base, n, out, each);
        case 2: return exact<2>(base, n, out, each);
        case 4: return exact<4>(base, n, out, each);
        default: return exact<8>(base, n, out, each);
    }
}

// Decodes the elements of a pack in order, a stretch at a time.
class Unpacker {
public:
    Unpacker() = default;
    explicit Unpacker(const Packed& pack) : pack_(pack), at_(pack.start) {}

    // The elements from the last stretch's end up to flat index `to`. False where the record of a tile, number `bad`, is
    // none of its own.
    bool next(int64_t to, uint8_t* out) {
        const int64_t begin = at_, offset = begin - pack_.start;
        const uint8_t* shared = pack_.shared == nullptr ? nullptr : pack_.shared + 2 * offset;
        return decode(pack_, pack_.base + offset * pack_.size, shared, to - begin, out,
                      [&](auto put) { return walk(begin, to, put); });
    }

    // Calls put(place from the last stretch's end, values of the tile, number among its kept) for each element up to `to`
    // that is kept. False as above.
    template <typename Put>
    bool each(int64_t to, Put put) {
        return walk(at_, to, put);
    }

    int64_t bad = -1;

private:
    template <typename Put>
    bool walk(int64_t begin, int64_t to, Put put) {
        while (at_ < to && bad < 0) {
            if (!open_) {
                record_ = Record(pack_, j_);
                record_.kept.until(at_ - record_.from, [](int64_t, int64_t) {});
                open_ = true;
            }
            const uint8_t* values = record_.values;
            const int64_t shift = record_.from - begin, last = record_.from + record_.n;
            at_ = to < last ? to : last;
            record_.kept.until(at_ - record_.from, [&](int64_t p, int64_t i) { put(p + shift, values, i); });
            if (at_ < last && at_ < pack_.stop) break;
            if (!record_.is_sound()) bad = pack_.first + j_;
            open_ = false, ++j_;
        }
        return bad < 0;
    }

    Packed pack_;
    Record record_;
    int64_t at_ = 0, j_ = 0;
    bool open_ = false;
};

// The elements of a whole tensor at `count` ascending positions; the base and the shared edit hold those alone. The number
// of a tile whose record is none of its own, -1.
inline int64_t unpack_at(const Packed& p, const int64_t* positions, int64_t count, uint8_t* out) {
    int64_t bad = -1;
    decode(p, p.base, p.shared, count, out, [&](auto put) {
        for (int64_t g = 0; g < count && bad < 0;) {
            const int64_t j = positions[g] / p.tile;
            Record record(p, j);
            record.kept.until(record.n, [&](int64_t at, int64_t i) {
                while (g < count && positions[g] < record.from + at) ++g;
                for (; g < count && positions[g] == record.from + at; ++g) put(g, record.values, i);
            });
            if (!record.is_sound()) bad = j;
            while (g < count && positions[g] < record.from + record.n) ++g;
        }
        return bad < 0;
    });
    return bad;
}

}  // namespace OTA_ISA
}  // namespace ota
