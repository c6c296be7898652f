//! Real kernel: public test programs for file systems, and programs that are hard on one, run in a session of each kind
//! of pool, in copies of it, and on a plain overlay beside it.

#[path = "../support/cgroup.rs"]
mod cgroup;
mod fsx;
mod installed;
#[path = "../support/lab.rs"]
mod lab;
mod pjdfstest;
#[path = "../support/process.rs"]
mod process;
mod programs;
