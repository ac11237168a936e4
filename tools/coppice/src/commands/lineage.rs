//! Commands about how snapshots relate: `diff`, `tree`, and what they cost.

use std::collections::HashMap;

use anyhow::Result;
use coppice_engine::Bill;
use serde::Serialize;

use super::store::{heading, short};
use crate::client::{Client, unexpected};
use crate::output::{Output, bytes, table};
use crate::rpc::{Difference, LineageLine, PartDifference, Reply, Request, SnapshotUsage, Usage};

/// Extents of a part that are listed unless all are wanted.
const EXTENTS_SHOWN: usize = 20;

/// Asks what the store, or one snapshot of it, costs.
pub(super) fn usage(client: &Client, name: Option<String>) -> Result<Usage> {
    match client.call(Request::Usage { name })? {
        Reply::Usage(usage) => Ok(usage),
        other => unexpected(&other),
    }
}

/// Where the store's bytes are.
pub(super) fn store_bill(usage: &Usage) -> String {
    let bill = &usage.store;
    format!(
        "\nreferenced  {}\npages       {}\nmetadata    {}\ntables      {}\nroot log    {}\n\
         dead        {}, of it {} in {} packs that `coppice gc` drops\n\
         kept twice  {} of the dead: gathered into other packs\n\
         counted by reading {} tree nodes in {:.1} s\n",
        bytes(bill.referenced_bytes),
        bytes(bill.page_bytes),
        bytes(bill.metadata_bytes),
        bytes(bill.table_bytes),
        bytes(bill.root_log_bytes),
        bytes(bill.dead_bytes),
        bytes(bill.dead_pack_bytes),
        bill.dead_packs,
        bytes(bill.kept_twice_bytes),
        usage.nodes_walked,
        usage.seconds
    )
}

/// A line of a bill: what it is called, and the figure.
type Line = (&'static str, fn(&Bill) -> u64);

/// What a snapshot holds and would free.
pub(super) fn snapshot_bill(usage: &SnapshotUsage) -> String {
    let subtree = format!("WITH {} DESCENDANTS", usage.subtree_snapshots.saturating_sub(1));
    let mut rows = vec![vec![String::new(), "ALONE".to_owned(), subtree]];
    let lines: [Line; 6] = [
        ("logical", |bill| bill.logical_bytes),
        ("referenced", |bill| bill.referenced_bytes),
        ("shared", |bill| bill.shared_bytes),
        ("exclusive", |bill| bill.exclusive_bytes),
        ("frees now", |bill| bill.frees_now),
        ("frees after repack", |bill| bill.frees_after_repack),
    ];
    rows.extend(
        lines.map(|(what, of)| {
            vec![what.to_owned(), bytes(of(&usage.own)), bytes(of(&usage.subtree))]
        }),
    );
    format!("\n{}", table(&rows))
}

pub(super) fn diff(
    client: &Client,
    one: String,
    other: String,
    all: bool,
    out: Output,
) -> Result<()> {
    let reply = client.call(Request::Diff { one, other })?;
    let Reply::Differs(found) = reply else { return unexpected(&reply) };
    let shown = if all { usize::MAX } else { EXTENTS_SHOWN };
    out.print(&found, || difference_text(&found, shown))
}

fn difference_text(found: &Difference, shown: usize) -> String {
    found.parts.iter().map(|part| part_text(part, shown)).collect()
}

fn part_text(part: &PartDifference, shown: usize) -> String {
    if let Some(owner) = &part.only_in {
        return format!("{}: only in {owner}\n", part.part);
    }
    if part.extents.is_empty() && part.logical_bytes[0] == part.logical_bytes[1] {
        return format!("{}: equal\n", part.part);
    }
    let count = part.extents.len();
    let mut text =
        format!("{}: {} differ in {count} extents\n", part.part, bytes(part.changed_bytes));
    if part.logical_bytes[0] != part.logical_bytes[1] {
        let [left, right] = part.logical_bytes;
        text += &format!("  length {left} and {right} bytes\n");
    }
    for extent in part.extents.iter().take(shown) {
        text += &format!("  {:>14} + {}\n", extent.offset, extent.length);
    }
    if count > shown {
        text += &format!("  and {} more: --all lists them\n", count - shown);
    }
    if part.extents_left_off > 0 {
        text += &format!("  and {} more that are not listed\n", part.extents_left_off);
    }
    text
}

#[derive(Serialize)]
struct Tree {
    snapshots: Vec<LineageLine>,
}

pub(super) fn tree(client: &Client, usage: bool, out: Output) -> Result<()> {
    let reply = client.call(Request::Lineage { usage })?;
    let Reply::Lineage(snapshots) = reply else { return unexpected(&reply) };
    let tree = Tree { snapshots };
    out.print(&tree, || drawn(&tree.snapshots, usage))
}

/// The lineage as a drawing. Works off a list, so no depth is too deep.
fn drawn(lines: &[LineageLine], usage: bool) -> String {
    let (tops, children) = arranged(lines);
    let mut rows = vec![heading(&["SNAPSHOT", "KIND", "ID", "SIZE", "ADDED"])];
    if usage {
        rows[0].extend(heading(&["EXCLUSIVE", "FREES NOW", "AFTER REPACK"]));
    }
    let mut open: Vec<(usize, String, bool, bool)> =
        tops.iter().rev().map(|top| (*top, String::new(), true, true)).collect();
    while let Some((at, indent, is_last, is_top)) = open.pop() {
        let branch = match (is_top, is_last) {
            (true, _) => "",
            (false, true) => "└─ ",
            (false, false) => "├─ ",
        };
        rows.push(row(&lines[at], &format!("{indent}{branch}"), usage));
        let below = match (is_top, is_last) {
            (true, _) => indent,
            (false, true) => indent + "   ",
            (false, false) => indent + "│  ",
        };
        let own = children.get(&at).map_or(&[][..], Vec::as_slice);
        for (number, child) in own.iter().enumerate().rev() {
            open.push((*child, below.clone(), number + 1 == own.len(), false));
        }
    }
    table(&rows)
}

/// The lines without a listed parent, and the children of the others.
fn arranged(lines: &[LineageLine]) -> (Vec<usize>, HashMap<usize, Vec<usize>>) {
    let by_id: HashMap<&str, usize> =
        lines.iter().enumerate().map(|(at, line)| (line.id.as_str(), at)).collect();
    let mut tops = Vec::new();
    let mut children: HashMap<usize, Vec<usize>> = HashMap::new();
    for (at, line) in lines.iter().enumerate() {
        match line.parent.as_ref().and_then(|parent| by_id.get(parent.as_str())) {
            Some(parent) => children.entry(*parent).or_default().push(at),
            None => tops.push(at),
        }
    }
    (tops, children)
}

fn row(line: &LineageLine, branch: &str, usage: bool) -> Vec<String> {
    let names = match line.names.as_slice() {
        [] => short(&line.id),
        names => names.join(", "),
    };
    let note = if line.parent_removed { " (its parent was removed)" } else { "" };
    let mut row = vec![
        format!("{branch}{names}{note}"),
        line.kind.clone(),
        short(&line.id),
        bytes(line.logical_bytes),
        bytes(line.stored_bytes),
    ];
    if let Some(cost) = line.usage.as_ref().filter(|_| usage) {
        row.push(bytes(cost.exclusive_bytes));
        row.push(bytes(cost.frees_now));
        row.push(bytes(cost.frees_after_repack));
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: &str, parent: Option<&str>) -> LineageLine {
        LineageLine {
            id: id.to_owned(),
            names: Vec::new(),
            kind: "machine".to_owned(),
            parent: parent.map(str::to_owned),
            parent_removed: parent == Some("gone"),
            logical_bytes: 0,
            stored_bytes: 0,
            created_unix_ms: 0,
            usage: None,
        }
    }

    #[test]
    fn branches_are_drawn() {
        let lines = [
            line("a", None),
            line("b", Some("a")),
            line("c", Some("b")),
            line("d", Some("a")),
            line("e", Some("gone")),
        ];
        let text = drawn(&lines, false);
        let first: Vec<&str> = text
            .lines()
            .skip(1)
            .map(|row| row.split("  machine").next().unwrap_or("").trim_end())
            .collect();
        assert_eq!(first, ["a", "├─ b", "│  └─ c", "└─ d", "e (its parent was removed)"]);
    }

    #[test]
    fn a_deep_lineage_is_drawn() {
        let mut lines = vec![line("0", None)];
        lines.extend((1..1000).map(|n| line(&n.to_string(), Some(&(n - 1).to_string()))));
        assert_eq!(drawn(&lines, false).lines().count(), 1001);
    }
}
