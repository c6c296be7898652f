//! Real kernel: public test programs for file systems, and programs that are hard on one, run in a session of each kind
//! of pool, in copies of it, and on a plain overlay beside it.

mod fsx;
#[path = "../support/lab.rs"]
mod lab;
mod pjdfstest;
mod process;
mod programs;
