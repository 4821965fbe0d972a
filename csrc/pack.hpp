// The border of packed experts: their functions of the Python module (ota_kernels/io/README.md has the format).
#pragma once

#include <nanobind/nanobind.h>

void bind_packs(nanobind::module_& m);
