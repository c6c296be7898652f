//! Puts right what a crash left half made.
