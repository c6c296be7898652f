//! Brings a tree's directories and contents onto the node.
