// Where the packed codes of a page's keys lie, as key_sketch/packing.py lays them out: tiles of up
// to 16 tokens; within a tile columns of four bytes a key, token after token. The last column has
// two bytes if the width is no multiple of four.
#pragma once

#include <algorithm>
#include <cstdint>

namespace psa {

struct SketchLayout {
  int page_size, width, tile, columns;

  SketchLayout(int page, int head_dim, int bits)
      : page_size(page),
        width(head_dim * bits / 8),
        tile(std::min(page, 16)),
        columns((width + 3) / 4) {}

  int page_bytes() const { return page_size * width; }
  int column_bytes(int column) const { return std::min(4, width - 4 * column); }
  // First byte of the token `offset` of a page in a column.
  int place(int offset, int column) const {
    return offset / tile * tile * width + 4 * tile * column +
           offset % tile * column_bytes(column);
  }
};

}  // namespace psa
