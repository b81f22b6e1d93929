//! The balloon's queues, driven from the guest's side.

mod adversarial;
mod basic;
mod blocked;
mod driver;
mod reporting;
