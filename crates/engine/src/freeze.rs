//! Holds the processes of pods still.
