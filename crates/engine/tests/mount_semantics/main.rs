//! Real kernel: `docs/semantics.md`, row by row, on every kind of pool. A row without a test and a test without a row are
//! failures. `AETHER_CLAIM=name` runs one row alone.

#[path = "../support/lab.rs"]
mod lab;
mod tools;

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use aether_engine::testing::isolated;
use lab::{Lab, Medium};

macro_rules! claims {
    ($($module:ident: $($name:ident)*;)*) => {
        $(mod $module;)*

        /// Each row of the page, under the name of its test.
        const CLAIMS: &[(&str, fn(&Lab))] = &[$($((stringify!($name), $module::$name)),*),*];
    };
}

claims! {
    names:
        names_differ_by_case
        names_are_any_bytes_up_to_255
        trees_may_be_deeper_than_a_path
        base_directories_move_whole
        directories_beyond_4096_bytes_move_only_by_copy
        directories_made_anew_hide_the_base
        empty_directories_and_symlinks_are_kept;
    links:
        hard_links_made_in_the_session_stay
        hard_links_of_the_base_part_when_written
        hard_links_to_base_files_hold;
    inodes:
        inode_numbers_of_the_base_stay
        inode_numbers_of_new_files_stay_in_forks_on_btrfs
        devices_differ_by_layer
        listings_and_stat_agree_on_inode_numbers_of_files;
    times:
        modification_times_keep_nanoseconds
        change_times_stay_on_the_node
        access_times_stay_on_the_node;
    attributes:
        user_attributes_are_kept
        other_attributes_stay_on_the_node
        access_lists_need_a_touch_and_stay_on_the_node
        modes_are_kept_and_setuid_is_not_honoured
        owners_are_kept_where_they_differ
        the_root_keeps_its_attributes
        immutable_files_do_not_hold_up_a_session;
    contents:
        sparse_files_stay_sparse_on_the_node
        unnamed_files_can_be_given_a_name
        removed_files_stay_readable_while_open
        shared_maps_taken_before_a_write_stay_old
        shared_maps_for_writing_are_coherent
        descriptors_opened_before_a_write_see_it
        syncs_are_not_ignored
        copies_share_space_on_btrfs
        direct_io_works
        base_files_count_with_their_size;
    special:
        fifos_are_kept
        sockets_stay_on_the_node
        devices_stay_on_the_node
        the_device_0_0_cannot_be_made;
    sharing:
        locks_hold_across_copy_up
        locks_are_not_shared_with_forks
        watches_see_changes_across_copy_up
        one_overlay_fits_on_top
        pods_come_and_go
        a_restore_in_place_replaces_files;
}

fn fill(base: &Path) {
    names::fill(base);
    links::fill(base);
    times::fill(base);
    attributes::fill(base);
    contents::fill(base);
    special::fill(base);
}

fn hold(root: &Path, medium: Medium) {
    let wanted = std::env::var("AETHER_CLAIM").ok();
    let lab = Lab::new(root, medium, fill);
    let mut broken = Vec::new();
    let mut tried = 0;
    for (name, claim) in CLAIMS {
        if wanted.as_deref().is_some_and(|wanted| wanted != *name) {
            continue;
        }
        tried += 1;
        if catch_unwind(AssertUnwindSafe(|| claim(&lab))).is_err() {
            broken.push(*name);
        }
    }
    assert!(tried > 0, "no row of docs/semantics.md is called {wanted:?}");
    assert_eq!(broken, Vec::<&str>::new(), "rows of docs/semantics.md that do not hold on {medium:?}; see above");
    assert_eq!(lab.fsck(), Vec::<String>::new());
}

#[test]
fn the_page_holds_on_btrfs() {
    isolated("the_page_holds_on_btrfs", |root| hold(root, Medium::Btrfs));
}

#[test]
fn the_page_holds_on_directories() {
    isolated("the_page_holds_on_directories", |root| hold(root, Medium::Directory));
}

#[test]
fn the_page_holds_in_memory() {
    isolated("the_page_holds_in_memory", |root| hold(root, Medium::Memory));
}

/// The last cell of a row is the name of its test.
fn rows(page: &str) -> Vec<&str> {
    let cells = page.lines().filter_map(|line| line.strip_suffix('|')?.rsplit('|').next());
    cells.filter_map(|cell| cell.trim().strip_prefix('`')?.strip_suffix('`')).collect()
}

#[test]
fn every_row_of_the_page_has_a_test_and_every_test_a_row() {
    let page = include_str!("../../../../docs/semantics.md");
    let rows = rows(page);
    let unique: BTreeSet<&str> = rows.iter().copied().collect();
    assert_eq!(unique.len(), rows.len(), "a test is named by two rows");
    let tests: BTreeSet<&str> = CLAIMS.iter().map(|(name, _)| *name).collect();
    assert_eq!(unique.difference(&tests).collect::<Vec<_>>(), Vec::<&&str>::new(), "rows without a test");
    assert_eq!(tests.difference(&unique).collect::<Vec<_>>(), Vec::<&&str>::new(), "tests without a row");
    let table_rows = page.lines().filter(|line| line.starts_with('|') && !line.contains("---")).count();
    let headings = page.lines().filter(|line| line.starts_with('|') && line.contains("| Test |")).count();
    assert_eq!(table_rows - headings, rows.len(), "a row names no test");
}
