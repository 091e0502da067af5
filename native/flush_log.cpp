// Prints what is still in the log's queue when the program ends.
//
// llama.cpp's log is printed by a thread that nobody waits for at the end, so the
// last lines, which hold the results, get lost on a busy machine.
#include "log.h"

namespace {

struct FlushAtExit {
    ~FlushAtExit() { common_log_flush(common_log_main()); }
} flush_at_exit;

}  // namespace
