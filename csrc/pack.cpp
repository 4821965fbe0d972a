// Packed experts for Python: elements of a range, or at positions. Merges decode their own (pack_stretches.hpp).

#include "pack.hpp"

#include "pack_arguments.hpp"

#define OTA_ISA packs
#include "pack_records.hpp"

using namespace nb::literals;

namespace {

using namespace ota::OTA_ISA;

void check_room(const ota::Packed& p, const OutBytes& out, int64_t n) {
    require(static_cast<int64_t>(out.size()) == n * p.out_size(), "room for the elements");
    require(p.values == ota::Values::exact || reinterpret_cast<uintptr_t>(out.data()) % 8 == 0, "aligned room");
}

// All elements of a part. The number of a tile whose record is none of its own, -1.
int64_t unpack(nb::handle part, OutBytes out) {
    const ota::Packed p = packed(part, number<int64_t>(part, "stop") - number<int64_t>(part, "start"));
    check_room(p, out, p.stop - p.start);
    nb::gil_scoped_release unlocked;
    Unpacker unpacker(p);
    unpacker.next(p.stop, out.data());
    return unpacker.bad;
}

// Elements at ascending positions of a tensor, all of which is the part but for its base and shared edit: they hold the
// elements there alone.
int64_t at_positions(nb::handle part, Ints positions, OutBytes out) {
    const ota::Packed p = packed(part);
    const auto n = static_cast<int64_t>(positions.size());
    const auto bytes = array<Bytes>(part.attr("base").attr("data"), "a base's elements are bytes");
    require(static_cast<int64_t>(bytes.size()) == n * p.size, "the base's elements");
    require(p.start == 0 && p.stop == p.numel && p.first == 0, "a whole tensor");
    check_room(p, out, n);
    for (int64_t i = 0; i < n; ++i)
        require(positions.data()[i] >= (i ? positions.data()[i - 1] : 0) && positions.data()[i] < p.numel, "in order");
    nb::gil_scoped_release unlocked;
    return ota::OTA_ISA::unpack_at(p, positions.data(), n, out.data());
}

}  // namespace

void bind_packs(nb::module_& m) {
    m.def("unpack", &unpack, "part"_a, "out"_a);
    m.def("unpack_at", &at_positions, "part"_a, "positions"_a, "out"_a);
}
