// Walks through every block's pieces of launches of all sizes and checks what cuda/sm90/schedule.cuh promises.
// Built and run by test_schedule.py; prints the first broken promise, else how many launches were checked.
#include "../../cuda/sm90/schedule.cuh"

#include <algorithm>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

struct Grid {
  int item_count, stage_count, block_count, own_block;
  bool room;

  int items() const { return item_count; }
  int stages() const { return stage_count; }
  int blocks() const { return block_count; }
  int block() const { return own_block; }
  bool has_room() const { return room; }
};

template <bool kCuts_, int kBlocks_>
struct Tile {
  static constexpr bool kCuts = kCuts_;
  static constexpr int kBlocks = kBlocks_;
};

void require(bool holds, const char* promise, const Grid& grid) {
  if (holds) return;
  printf("%s: %d items of %d stages, %d blocks, block %d, %s\n", promise, grid.item_count, grid.stage_count,
         grid.block_count, grid.own_block, grid.room ? "room for sums" : "no room for sums");
  exit(1);
}

template <class Tile>
void check(Grid grid) {
  using LaunchOf = Launch<Tile, Grid>;
  std::vector<int> done(size_t(grid.item_count) * grid.stage_count);        // how often each stage was multiplied
  std::vector<int> left_by(grid.block_count, -1), left_end(grid.block_count);  // item and end of the piece left
  struct Wait {
    int block, item, first, last_dealer;
  };
  std::vector<Wait> waits;
  int least = INT_MAX, most = 0, whole_least = INT_MAX, whole_most = 0;
  const LaunchOf launch(grid);
  for (int block = 0; block < grid.block_count; ++block) {
    grid.own_block = block;
    require(block_of(grid, own_dealer(grid)) == block, "a block's dealer is its own", grid);
    Walk<Tile, Grid> walk(grid, launch);
    int stages = 0, dealt = 0, whole = 0, number = 0;
    bool last = false;
    for (Piece piece; walk.next(grid, piece); ++number) {
      require(!last, "the start of an item comes last", grid);
      require(0 <= piece.item && piece.item < grid.item_count && 0 <= piece.first_stage &&
                  piece.first_stage < piece.end_stage && piece.end_stage <= grid.stage_count,
              "a piece is some stages of an item", grid);
      for (int s = piece.first_stage; s < piece.end_stage; ++s) ++done[size_t(piece.item) * grid.stage_count + s];
      const bool continues = piece.first_stage > 0, starts = !continues && piece.end_stage < grid.stage_count;
      require(!(continues || starts) || (Tile::kCuts && grid.room), "only items that may be cut are", grid);
      if (continues) {
        require(number == 0, "a rest comes first", grid);
        left_by[block] = piece.item, left_end[block] = piece.end_stage;
      }
      if (starts) {
        last = true;
        waits.push_back({block, piece.item, piece.end_stage, launch.last_dealer(piece)});
      }
      stages += piece.end_stage - piece.first_stage;
      if (piece.item < launch.cut) dealt += piece.end_stage - piece.first_stage;
      else ++whole;
    }
    least = std::min(least, stages), most = std::max(most, stages);
    whole_least = std::min(whole_least, whole), whole_most = std::max(whole_most, whole);
    if (own_dealer(grid) < launch.dealers)
      require(std::abs(dealt - launch.cut * grid.stage_count / launch.dealers) <= 1, "dealt shares are even", grid);
    else require(dealt == 0, "only dealers are dealt stages", grid);
  }
  grid.own_block = -1;
  for (int count : done) require(count == 1, "every stage of every item is done once", grid);
  require(whole_most - whole_least <= 1, "whole items go round evenly", grid);
  if (launch.cut > 0 && launch.dealers == grid.block_count)
    require(most - least <= 1, "all blocks have as many stages", grid);

  // Who starts an item adds what the blocks that follow it as dealers left, up to the last: all the item's other pieces,
  // in order, and nothing else.  All of them were started before, by their number.
  std::vector<int> taken(grid.block_count);
  for (const Wait& wait : waits) {
    grid.own_block = wait.block;
    int from = wait.first;
    for (int dealer = own_dealer(grid) + 1; dealer <= wait.last_dealer; ++dealer) {
      const int other = block_of(grid, dealer);
      require(0 <= other && other < wait.block, "a block waits for blocks that were started before it", grid);
      require(left_by[other] == wait.item, "a block that is waited for leaves sums of the item", grid);
      ++taken[other];
      from = left_end[other];
    }
    require(from == grid.stage_count, "the last dealer has the item's end", grid);
  }
  for (int block = 0; block < grid.block_count; ++block) {
    grid.own_block = block;
    require(taken[block] == (left_by[block] >= 0), "sums that are left are added once", grid);
  }
}

}  // namespace

int main() {
  long launches = 0;
  auto check_all = [&](int items, int stages, int blocks) {
    for (bool room : {false, true}) {
      check<Tile<true, 1>>({items, stages, blocks, 0, room});
      check<Tile<true, 2>>({items, stages, blocks, 0, room});
      check<Tile<false, 1>>({items, stages, blocks, 0, room});
      launches += 3;
    }
  };
  for (int blocks = 1; blocks <= 20; ++blocks)
    for (int items = 0; items <= 4 * blocks + 3; ++items)
      for (int stages = 1; stages <= 40; ++stages) check_all(items, stages, blocks);
  // Devices of 132 multiprocessors, one or two blocks on each, and the depths of named models.
  for (int blocks : {114, 132, 228, 264})
    for (int items = 0; items <= 3 * blocks; items += 7)
      for (int stages : {1, 12, 22, 32, 64, 224}) check_all(items, stages, blocks);
  printf("%ld launches\n", launches);
}
