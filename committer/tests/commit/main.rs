//! Commits to real repositories over http, https and ssh, by the program itself, out of a real store node.
//!
//! What is pushed is fetched by plain git and compared with what a session had, file by file; and copies of trees are
//! compared with the trees.

mod answers;
mod exported;
mod kept;
mod killed;
mod moved;
mod pushed;
mod world;
