//! `coppice gc`: what would be freed, and freeing it.

use anyhow::Result;
use coppice_engine::{GcAction, GcPack, GcPlan, GcReport};
use serde::Serialize;

use super::store::heading;
use crate::cli::Gc;
use crate::client::{Client, unexpected};
use crate::output::{Bar, Output, bytes, table};
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
    let bar = Bar::new();
    let (reply, _) = client.ask(request, &[], &mut |step| bar.show(&step))?;
    drop(bar);
    match reply {
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
    text += &fragmented(plan);
    text + &format!(
        "gathers              {}\nfrees now            {}\nrewrites             {}\n\
         frees after that     {}\nkept twice now       {}",
        bytes(plan.gathered_bytes),
        bytes(plan.freed_now_bytes),
        bytes(plan.rewritten_bytes),
        bytes(plan.freed_after_repack_bytes),
        bytes(plan.kept_twice_bytes)
    )
}

/// Images that are told one by one.
const IMAGES_SHOWN: usize = 10;

/// The images that take too many frames; a long lineage has many.
fn fragmented(plan: &GcPlan) -> String {
    let mut text = String::new();
    for image in plan.fragmented.iter().take(IMAGES_SHOWN) {
        text += &format!(
            "image {:.12} takes {} frames, {} when fresh: {} of its pages are gathered first\n",
            image.root.to_string(),
            image.frames,
            image.frames_when_fresh,
            image.rewritten_pages
        );
    }
    let more = plan.fragmented.len().saturating_sub(IMAGES_SHOWN);
    if more > 0 {
        text += &format!("and {more} more images: --json lists them\n");
    }
    text
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
        bytes(report.rewritten_bytes.saturating_sub(report.gathered_bytes))
    );
    if report.straightened_images > 0 {
        text += &format!(
            "\n{} images gathered into fewer frames ({} written)",
            report.straightened_images,
            bytes(report.gathered_bytes)
        );
    }
    if report.kept_twice_bytes > 0 {
        text += &format!(
            "\n{} are kept twice until more of their packs is dead",
            bytes(report.kept_twice_bytes)
        );
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
