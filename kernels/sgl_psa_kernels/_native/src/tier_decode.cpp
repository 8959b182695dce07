// Entry points of the page tier.
#include "decode_tasks.h"
#include "tier_pool.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace psa {
namespace {

template <class T>
struct Context {
  const PsaDecodeArgs& a;
  const Tasks<T>& tasks;

  static void run(void* self, int task, DecodeFiber& fiber) {
    const Context& c = *static_cast<Context*>(self);
    TierPool<T> pool(c.a, fiber, c.tasks.row(task), c.tasks.heads(task));
    c.tasks.run(task, pool, fiber.scratch);
  }
};

template <class T>
void run(Tier& tier, PsaTierDecodeArgs& args, Scratch& shared) {
  const PsaDecodeArgs& a = args.decode;
  const Tasks<T> tasks(a, shared, false);
  Context<T> context{a, tasks};
  const int threads = std::max(1, std::min(a.rows.num_threads, tasks.count()));
  DecodeCrew crew(tier, args.layer, args.step, threads, tasks.count(), Context<T>::run, &context);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    crew.work(omp_get_thread_num());
#else
    crew.work(0);
#endif
  }
  crew.finish();
  for (int i = 0; i < tasks.merges(); i++) tasks.merge(i);
}

template <class Fn>
int guarded(PsaTierError& error, Fn call) {
  try {
    call();
    return PSA_OK;
  } catch (const TierFailure& failure) {
    error = failure.error;
    return failure.status;
  } catch (const std::bad_alloc&) {
    return PSA_NO_MEMORY;
  }
}

}  // namespace

void Tier::decode(PsaTierDecodeArgs& args) {
  {
    const Lock lock(mutex_);
    require_whole();
    if (room(args.layer) < block_pages(args.decode.rows)) no_frame(args.layer);
  }
  const bool known = with_dtype(args.decode.rows.dtype, [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(*this, args, fibers_->shared);
  });
  if (!known) throw TierFailure{PSA_BAD_DTYPE, {}};
  const Lock lock(mutex_);
  require_whole();
}

}  // namespace psa

using psa::Tier;

extern "C" int psa_tier_create(PsaTierCreateArgs* args) {
  return psa::guarded(args->error, [&] { args->tier = new Tier(*args); });
}
extern "C" int psa_tier_write(PsaTierRowsArgs* args) {
  return psa::guarded(args->error, [&] { static_cast<Tier*>(args->tier)->write(*args); });
}
extern "C" int psa_tier_gather(PsaTierRowsArgs* args) {
  return psa::guarded(args->error, [&] { static_cast<Tier*>(args->tier)->gather(*args); });
}
extern "C" int psa_tier_decode(PsaTierDecodeArgs* args) {
  if (const int status = psa::check_decode(args->decode)) return status;
  return psa::guarded(args->error, [&] { static_cast<Tier*>(args->tier)->decode(*args); });
}
extern "C" int psa_tier_control(PsaTierControlArgs* args) {
  Tier* tier = static_cast<Tier*>(args->tier);
  if (args->command == PSA_TIER_DESTROY) {
    delete tier;
    return PSA_OK;
  }
  return psa::guarded(args->error, [&] { tier->control(*args); });
}
