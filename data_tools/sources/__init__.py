"""Whatever people have → records. One file a source; each ends in `data_tools.build.build_store`."""
