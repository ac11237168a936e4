//! `coppice gc`: what would be freed, and freeing it.

use anyhow::Result;
use coppice_engine::{GcAction, GcPack, GcPlan, GcReport};
use serde::Serialize;

use super::store::heading;
use crate::cli::Gc;
use crate::client::{Client, unexpected};
use crate::output::{Output, bytes, table};
use crate::rpc::{Reply, Request};

/// `gc --json`.
#[derive(Serialize)]
struct Done<'r> {
    #[serde(flatten)]
    report: &'r GcReport,
    seconds: f64,
}

pub(super) fn gc(client: &Client, options: &Gc, out: Output) -> Result<()> {
    let request = Request::Collect { dry_run: options.dry_run, dead_percent_min: options.min_dead };
    match client.call(request)? {
        Reply::Planned(plan) => out.print(&plan, || planned(&plan)),
        Reply::Collected(done) => {
            let shown = Done { report: &done.report, seconds: done.seconds };
            out.print(&shown, || collected(&done.report, done.seconds))
        }
        other => unexpected(&other),
    }
}

fn planned(plan: &GcPlan) -> String {
    let touched: Vec<&GcPack> =
        plan.packs.iter().filter(|pack| pack.action != GcAction::Keep).collect();
    let mut text = String::new();
    if !touched.is_empty() {
        let mut rows = vec![heading(&["PACK", "ACTION", "SIZE", "LIVE", "DEAD"])];
        rows.extend(touched.into_iter().map(row));
        text = table(&rows) + "\n";
    }
    for image in &plan.fragmented {
        text += &format!(
            "image {:.12} takes {} frames, {} when fresh: {} pages are gathered first\n",
            image.root.to_string(),
            image.frames,
            image.frames_when_fresh,
            image.rewritten_pages
        );
    }
    text + &format!(
        "frees now            {}\nrewrites             {}\nfrees after that     {}",
        bytes(plan.freed_now_bytes),
        bytes(plan.rewritten_bytes),
        bytes(plan.freed_after_repack_bytes)
    )
}

fn row(pack: &GcPack) -> Vec<String> {
    let action = match pack.action {
        GcAction::Keep => "keep",
        GcAction::Repack => "repack",
        GcAction::Drop => "drop",
        GcAction::Busy => "busy: an ingest uses it",
    };
    vec![
        pack.pack.to_string(),
        action.to_owned(),
        bytes(pack.file_bytes),
        bytes(pack.live_stored_bytes),
        bytes(pack.dead_stored_bytes),
    ]
}

fn collected(report: &GcReport, seconds: f64) -> String {
    let mut text = format!(
        "{} freed: {} packs dropped, {} repacked ({} written), in {seconds:.1} s",
        bytes(report.freed_bytes),
        report.dropped_packs,
        report.repacked_packs,
        bytes(report.rewritten_bytes)
    );
    if report.straightened_images > 0 {
        text += &format!("\n{} images gathered into fewer frames", report.straightened_images);
    }
    if report.busy_packs > 0 {
        text +=
            &format!("\n{} packs are in use by an ingest: run it again later", report.busy_packs);
    }
    if report.damaged_packs > 0 {
        text += &format!(
            "\n{} packs are damaged and stay: `coppice check` says what is",
            report.damaged_packs
        );
    }
    if let Some(why) = &report.incomplete {
        text += &format!("\nrepacking ended early: {why}; make room and run it again");
    }
    text
}
