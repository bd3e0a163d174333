// How the items of a launch are spread over its blocks: integers only, for device and host; tests/cuda/test_schedule.py
// checks what is promised here.
//
// A block takes whole items in turn; before that, the stages of the items that would not go round evenly are dealt out,
// so that all blocks end together.  Where that cuts an item does not depend on which block is how fast: equal inputs
// give equal sums.
//
// Dealers are counted from the last block, so that the block with an item's start, which waits for the blocks with its
// other pieces, waits for blocks that were started before it and deal with those pieces first.
#pragma once
#include "../host_device.h"

// An item, or a piece of one: some stages of its depth.
struct Piece {
  int item, first_stage, end_stage;
};

// A Grid says what is to be spread over what: items(), stages() of an item's depth, blocks(), and
// has_room(), whether pieces have a place to leave their sums in; and block(), the one that asks.  It is asked whenever
// one of these is needed: a kernel reads them anew, since to keep them would take registers.

template <class Grid>
PM_HOST_DEVICE inline int block_of(const Grid& grid, int dealer) {
  return grid.blocks() - 1 - dealer;
}
template <class Grid>
PM_HOST_DEVICE inline int own_dealer(const Grid& grid) {
  return grid.blocks() - 1 - grid.block();
}

// What all blocks of a launch agree on.  Tile has kCuts, whether items may be cut, and kBlocks, that share a
// multiprocessor.
template <class Tile, class Grid>
class Launch {
 public:
  PM_HOST_DEVICE explicit Launch(const Grid& grid) : stages(grid.stages()) {
    const int blocks = grid.blocks(), rest = grid.items() % blocks;
    cut = Tile::kCuts && grid.has_room() && rest ? least(grid.items(), rest + blocks) : 0;
    // Where whole items go round nearly evenly, cutting costs more than it saves.
    if ((blocks - rest) * kWorthwhile < grid.items()) cut = 0;
    dealers = most(least(blocks, cut * stages / kMinStages), 1);
  }

  // First of the dealt stages that a dealer gets, and the dealer that gets one of them.
  PM_HOST_DEVICE int first_dealt(int dealer) const { return least(dealer, dealers) * (cut * stages) / dealers; }
  PM_HOST_DEVICE int dealer_of(int stage) const { return ((stage + 1) * dealers - 1) / (cut * stages); }
  // The last dealer with a piece of an item that is cut.
  PM_HOST_DEVICE int last_dealer(const Piece& piece) const { return dealer_of((piece.item + 1) * stages - 1); }

  int stages;
  int cut;  // items that are dealt in stages, the first ones
  int dealers;

 private:
  static constexpr int kMinStages = 4;  // a dealer's share, below which it would not pay
  static constexpr int kWorthwhile = 16;  // cut when more than a sixteenth of the time would be lost

  PM_HOST_DEVICE static int least(int a, int b) { return a < b ? a : b; }
  PM_HOST_DEVICE static int most(int a, int b) { return a > b ? a : b; }
};

// A block's pieces, in order: the rest of an item that another block begins, which that block waits for; whole items,
// dealt or in turn; the start of an item, whose rest should be there by then.
template <class Tile, class Grid>
class Walk {
 public:
  PM_HOST_DEVICE Walk(const Grid& grid, const Launch<Tile, Grid>& launch)
      : stages_(launch.stages), turn_(launch.cut + first_item(grid)), items_(grid.items()) {
    if constexpr (!Tile::kCuts) return;
    const int dealer = own_dealer(grid), begin = launch.first_dealt(dealer), end = launch.first_dealt(dealer + 1);
    dealt_ = uniform((begin + stages_ - 1) / stages_);
    rest_first_ = uniform(begin % stages_);
    rest_end_ = uniform(rest_first_ + end - begin < stages_ ? rest_first_ + end - begin : stages_);
    dealt_end_ = uniform(end / stages_);
    start_ = uniform(dealt_end_ < dealt_ ? 0 : end % stages_);
  }

  PM_HOST_DEVICE bool next(const Grid& grid, Piece& piece) {
    if (rest_first_ > 0) {
      piece = {dealt_ - 1, rest_first_, rest_end_};
      rest_first_ = 0;
    } else if (dealt_ < dealt_end_) {
      piece = {dealt_++, 0, stages_};
    } else if (turn_ < items_) {
      piece = {turn_, 0, stages_};
      turn_ += grid.blocks();
    } else if (start_ > 0) {
      piece = {dealt_end_, 0, start_};
      start_ = 0;
    } else {
      return false;
    }
    return true;
  }

 private:
  // Blocks 2i and 2i + 1 tend to share a multiprocessor: not both shall have an item more than the others.
  PM_HOST_DEVICE static int first_item(const Grid& grid) {
    if constexpr (Tile::kBlocks == 1) return grid.block();
    const unsigned blocks = grid.blocks(), block = grid.block();
    if (blocks % Tile::kBlocks) return block;
    return block % Tile::kBlocks * (blocks / Tile::kBlocks) + block / Tile::kBlocks;
  }

  int stages_, turn_, items_;  // turn_: the next item in turn
  int rest_first_ = 0, rest_end_ = 0, dealt_ = 0, dealt_end_ = 0, start_ = 0;
};
