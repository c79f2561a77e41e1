// What names mean while a kernel is parsed.
#include "names.h"

namespace ptxsim {
namespace {

const std::unordered_map<std::string, Special>& specials() {
  static const std::unordered_map<std::string, Special> names = {
      {"tid.x", Special::TidX},
      {"tid.y", Special::TidY},
      {"tid.z", Special::TidZ},
      {"ntid.x", Special::NtidX},
      {"ntid.y", Special::NtidY},
      {"ntid.z", Special::NtidZ},
      {"ctaid.x", Special::CtaidX},
      {"ctaid.y", Special::CtaidY},
      {"ctaid.z", Special::CtaidZ},
      {"nctaid.x", Special::NctaidX},
      {"nctaid.y", Special::NctaidY},
      {"nctaid.z", Special::NctaidZ},
      {"laneid", Special::Lane},
      {"warpid", Special::Warp},
      {"nwarpid", Special::WarpCount},
      {"lanemask_eq", Special::MaskEq},
      {"lanemask_lt", Special::MaskLt},
      {"lanemask_le", Special::MaskLe},
      {"lanemask_gt", Special::MaskGt},
      {"lanemask_ge", Special::MaskGe},
      {"total_smem_size", Special::SharedBytes},
      {"dynamic_smem_size", Special::SharedBytes},
      // One multiprocessor, a stopped clock, clusters of one block.
      {"smid", Special::Zero},
      {"clock", Special::Zero},
      {"clock64", Special::Zero},
      {"globaltimer", Special::Zero},
      {"cluster_ctarank", Special::Zero},
      {"cluster_ctaid.x", Special::Zero},
      {"cluster_nctarank", Special::One},
  };
  return names;
}

}  // namespace

void Names::declare(const std::string& name, bool predicate) {
  const int reg = program_.registers++;
  scopes_.back()[name] = reg;
  predicates_.resize(static_cast<size_t>(reg) + 1);
  predicates_[static_cast<size_t>(reg)] = predicate;
}

int Names::find(const std::string& name) const {
  for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
    const auto found = scope->find(name);
    if (found != scope->end()) return found->second;
  }
  return -1;
}

int Names::constant(uint64_t value, bool after_statics) {
  if (!after_statics) {
    const auto found = constants_.find(value);
    if (found != constants_.end()) return found->second;
  }
  const int reg = program_.registers++;
  if (after_statics) {
    after_statics_.push_back(program_.constants.size());
  } else {
    constants_[value] = reg;
  }
  program_.constants.emplace_back(reg, value);
  return reg;
}

int Names::symbol(const std::string& name, int64_t offset) {
  const auto found = symbols_.find(name);
  if (found == symbols_.end()) return -1;
  return constant(found->second.address + static_cast<uint64_t>(offset), found->second.after_statics);
}

int Names::special(const std::string& name) {
  const auto found = specials().find(name);
  if (found == specials().end()) return -1;
  const auto [slot, added] = program_.specials.try_emplace(found->second, -1);
  if (added) slot->second = program_.registers++;
  return slot->second;
}

int Names::sink() {
  if (sink_ < 0) sink_ = program_.registers++;
  return sink_;
}

void Names::finish() {
  program_.static_shared = (program_.static_shared + 15) / 16 * 16;
  for (const size_t i : after_statics_) program_.constants[i].second += static_cast<uint64_t>(program_.static_shared);
}

}  // namespace ptxsim
