#pragma once

#include "attention_forward.h"
#include "isa.h"

namespace fastattn {

// Up to so many query rows (of all heads of a group) the decode kernel is the faster one.
constexpr int64_t kDecodeRows = 16;

// attention_forward for few query rows.
FASTATTN_DECLARE(void attention_decode(const AttentionForwardArgs& args))

}  // namespace fastattn
