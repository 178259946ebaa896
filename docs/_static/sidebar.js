// Show the entry of the current page in the sidebar, which has more entries than fit.
document.addEventListener("DOMContentLoaded", () => {
    const box = document.querySelector(".sidebar-scroll");
    const entry = document.querySelector(".sidebar-tree .current-page > a");
    if (!box || !entry) return;
    const below = entry.getBoundingClientRect().bottom - box.getBoundingClientRect().bottom;
    if (below > 0) box.scrollTo({ top: below + box.clientHeight / 2, behavior: "instant" });
});
