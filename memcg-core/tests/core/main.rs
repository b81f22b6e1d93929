//! Tests of `memcg-core` through its public interface. One binary, one file per module.

mod accounting;
mod cases;
mod charge;
mod events;
mod evict;
mod frame;
mod grants;
mod lifetime;
mod limit_change;
mod limits;
mod lru;
mod lru_model;
mod model;
mod moving;
mod nodes;
mod oom;
mod overhead;
mod pressure;
mod protection;
mod reclaim;
mod shared;
mod shared_model;
mod spread;
mod stock;
mod transactions;
mod units;
